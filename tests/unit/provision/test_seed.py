# SPDX-License-Identifier: LGPL-2.1-or-later
"""The seed, as a guest finds it: read back with a program that is not the one which wrote it."""

import json
import subprocess
from uuid import UUID

import pytest

from kvmi_host.provision import ProvisionError, Settings, public_keys
from kvmi_host.provision.seed import seed_image

INSTANCE = UUID(int=7)
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me@here"


@pytest.fixture
def seed(tmp_path):
    """Makes a seed; its label, and its files by name."""

    def make(settings):
        image, files = tmp_path / "seed.iso", tmp_path / "files"
        image.write_bytes(seed_image(INSTANCE, settings))
        xorriso = ["xorriso", "-indev", image, "-osirrox", "on"]
        subprocess.run([*xorriso, "-extract", "/", files], check=True, capture_output=True, timeout=60)
        label = image.read_bytes()[0x8028:0x8048].decode().strip()  # ECMA-119: volume identifier, sector 16
        return label, {file.name: file.read_bytes() for file in files.iterdir()}

    return make


def test_a_seed_has_the_label_that_cloud_init_looks_for(seed):
    assert seed(Settings())[0] == "cidata"


def test_a_seed_has_two_files(seed):
    assert set(seed(Settings())[1]) == {"meta-data", "user-data"}


def test_meta_data_names_host_instance_and_keys(seed):
    meta = json.loads(seed(Settings("web", (KEY,)))[1]["meta-data"])
    assert meta == {"instance-id": str(INSTANCE), "local-hostname": "web", "public-keys": [KEY]}


def test_what_was_not_asked_for_is_not_set(seed):
    assert json.loads(seed(Settings())[1]["meta-data"]) == {"instance-id": str(INSTANCE)}


@pytest.mark.parametrize("data", [b"#!/bin/sh\nexit 0\n", b"", bytes(range(256)) * 100])
def test_user_data_is_passed_on_as_it_is(seed, data):
    assert seed(Settings(user_data=data))[1]["user-data"] == data


def test_without_user_data_there_is_an_empty_configuration(seed):
    assert seed(Settings())[1]["user-data"].startswith(b"#cloud-config\n")


def test_keys_are_lines_without_comments():
    options = f'from="10.0.0.0/8" {KEY}'
    assert public_keys(f"# mine\n\n{KEY}\n{options}\n", "keys") == (KEY, options)


@pytest.mark.parametrize("text", ["", "# none\n", "hello\n", f"{KEY}\nhello\n"])
def test_a_file_without_keys_is_refused(text):
    with pytest.raises(ProvisionError, match="no public SSH key"):
        public_keys(text, "keys")


def test_a_private_key_does_not_leave():
    with pytest.raises(ProvisionError, match=r"private.*id\.pub"):
        public_keys("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "id")
