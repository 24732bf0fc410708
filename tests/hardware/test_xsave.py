# SPDX-License-Identifier: LGPL-2.1-or-later
"""GET_XSAVE: the vCPU's vector registers, as XSAVE lays them out."""

from __future__ import annotations

import struct

import pytest

from kvmi_host.testing.puppet import Puppet, page

pytestmark = pytest.mark.hardware

SIZE = 4096
X87_AT, SSE_AT, HEADER_AT = 32, 160, 512
SSE = 1 << 1
HALF = bytes.fromhex("0000000000000080 fe3f")
"""0.5 as an 80-bit number."""


@pytest.mark.rule("3.23")
@pytest.mark.parametrize("vcpu", [0, 1])
@pytest.mark.parametrize("data", [bytes(range(16)), bytes(16), b"\xff" * 16], ids=["numbers", "zeros", "ones"])
def test_it_has_the_sse_registers(puppet: Puppet, vcpu: int, data: bytes) -> None:
    puppet.session.write_physical(page(0), data)
    puppet.run(vcpu, "read_sse", rsi=page(0))
    area = puppet.session.xsave(vcpu)
    assert area[SSE_AT : SSE_AT + 16] == data
    assert struct.unpack_from("<Q", area, HEADER_AT)[0] & SSE or not any(data)


@pytest.mark.rule("3.23")
def test_it_has_the_x87_registers(puppet: Puppet) -> None:
    puppet.session.write_physical(page(0), struct.pack("<d", 0.5))
    puppet.run(0, "fninit")
    puppet.run(0, "read_x87", rsi=page(0))
    area = puppet.session.xsave(0)
    assert area[X87_AT : X87_AT + 10] == HALF
    puppet.run(0, "fninit")


@pytest.mark.rule("3.23")
def test_it_has_the_size_of_the_kvm_api(puppet: Puppet) -> None:
    assert len(puppet.session.xsave(0)) == SIZE


@pytest.mark.rule("3.23")
def test_it_is_the_same_while_the_vcpu_waits(puppet: Puppet) -> None:
    puppet.session.write_physical(page(0), b"0123456789abcdef")
    puppet.run(0, "read_sse", rsi=page(0))
    puppet.session.pause_vcpu(0)
    event = puppet.event()
    assert puppet.session.xsave(0)[SSE_AT : SSE_AT + 16] == b"0123456789abcdef"
    puppet.session.reply(event)
