# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handshake's structs to the byte, and its rule that struct_size decides."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.protocol import HandshakeError, Hello, handshake

VM = UUID("00112233-4455-6677-8899-aabbccddeeff")
UUID_BYTES = "00112233445566778899aabbccddeeff"
HELLO = bytes.fromhex("60000000" + UUID_BYTES + "00000000" + "00f1536500000000") + b"webserver".ljust(64, b"\0")
SHA1_OF_SECRET = "e5e9fa1ba31ecd1ae84f75caaa474f3a663f05f4"  # of "secret", as sha1sum prints it


def test_the_vms_side_is_96_bytes_as_the_protocol_lays_them_out():
    assert handshake.encode_hello(Hello(VM, 0x6553F100, "webserver")) == HELLO
    assert len(HELLO) == 96


def test_the_vms_side_is_read_as_it_was_written():
    assert handshake.decode_hello(HELLO) == Hello(VM, 0x6553F100, "webserver")


def test_a_longer_struct_of_a_newer_peer_is_read_as_far_as_known():
    newer = bytes.fromhex("68000000") + HELLO[4:] + bytes.fromhex("0000000001000000")
    assert handshake.struct_length(newer[:4]) == 104
    assert handshake.decode_hello(newer) == Hello(VM, 0x6553F100, "webserver")


def test_a_shorter_struct_of_an_older_peer_leaves_fields_out():
    assert handshake.decode_hello(bytes.fromhex("14000000" + UUID_BYTES)) == Hello(VM)
    assert handshake.decode_hello(bytes.fromhex("20000000") + HELLO[4:32]) == Hello(VM, 0x6553F100)


def test_a_struct_without_a_uuid_is_an_error():
    with pytest.raises(HandshakeError, match="uuid"):
        handshake.decode_hello(bytes.fromhex("13000000") + bytes(15))


@pytest.mark.parametrize("size", ["00000000", "03000000", "01100000", "ffffffff"])
def test_a_size_that_no_struct_has_is_an_error(size):
    with pytest.raises(HandshakeError, match="does not speak"):
        handshake.struct_length(bytes.fromhex(size))


def test_a_long_name_is_cut_so_that_a_zero_ends_it():
    encoded = handshake.encode_hello(Hello(VM, 0, "n" * 80))
    assert encoded[32:] == b"n" * 63 + b"\0"


@given(st.binary(min_size=20, max_size=200))
def test_no_struct_raises_anything_but_handshake_error(data):
    handshake.decode_hello(data)


def test_the_introspectors_side_is_the_sha1_of_the_secret():
    assert handshake.encode_answer(b"secret") == bytes.fromhex("18000000" + SHA1_OF_SECRET)


def test_without_a_secret_the_hash_is_zero():
    assert handshake.encode_answer(None) == bytes.fromhex("18000000" + "00" * 20)


def test_the_right_cookie_is_accepted():
    handshake.check_answer(bytes.fromhex("18000000" + SHA1_OF_SECRET), b"secret")


def test_a_longer_answer_is_read_as_far_as_known():
    handshake.check_answer(bytes.fromhex("1c000000" + SHA1_OF_SECRET + "ffffffff"), b"secret")


@pytest.mark.parametrize("cookie", [b"Secret", None])
def test_a_wrong_cookie_is_refused(cookie):
    with pytest.raises(HandshakeError, match="wrong cookie"):
        handshake.check_answer(bytes.fromhex("18000000" + SHA1_OF_SECRET), cookie)


def test_an_answer_that_ends_before_the_cookie_is_refused():
    with pytest.raises(HandshakeError, match="cookie_hash"):
        handshake.check_answer(bytes.fromhex("17000000") + bytes(19), None)
