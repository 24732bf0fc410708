# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image's name means, and what a qcow2 says of itself."""

import subprocess
from pathlib import PurePosixPath

import pytest

from kvmi_host.provision import Image, NoImage, find_image
from kvmi_host.provision.images import disk_facts


def qcow2(path, *arguments, size="3M"):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments, path, size], check=True, timeout=60)
    return path


def test_images_are_looked_for_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("KVMI_IMAGES", "/from/environment")
    assert find_image("linux").kernel == PurePosixPath("/from/environment/linux.vmlinuz")
    assert find_image("linux", "/from/option").kernel == PurePosixPath("/from/option/linux.vmlinuz")
    monkeypatch.delenv("KVMI_IMAGES")
    assert find_image("modewalk").kernel == PurePosixPath("/opt/kvmi-host/images/modewalk.elf")


def test_debian_is_a_disk_with_its_kernel_beside_it():
    image = find_image("debian", "/images")
    assert image.disk == PurePosixPath("/images/debian.qcow2")
    assert image.kernel == PurePosixPath("/images/debian.vmlinuz")
    assert "root=LABEL=debian" in image.cmdline
    assert image.copied


def test_an_image_can_be_a_kernel_of_the_users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_image("my/kernel.elf") == Image("kernel.elf", PurePosixPath(tmp_path, "my/kernel.elf"))


def test_a_disk_of_the_users_is_known_by_what_is_in_it(tmp_path):
    path = qcow2(tmp_path / "disk.img")
    assert find_image(str(path)) == Image("disk.img", disk=PurePosixPath(path))


def test_a_disk_that_is_not_here_is_known_by_its_name():
    assert find_image("/on/the/host/disk.qcow2") == Image("disk.qcow2", disk=PurePosixPath("/on/the/host/disk.qcow2"))


def test_a_qcow2_says_how_large_a_disk_it_is(tmp_path):
    assert disk_facts(qcow2(tmp_path / "disk.qcow2", size="5M")).size == 5 << 20


def test_an_overlay_is_told_from_what_is_whole(tmp_path):
    whole = qcow2(tmp_path / "whole.qcow2")
    overlay = qcow2(tmp_path / "overlay.qcow2", "-b", whole, "-F", "qcow2")
    assert not disk_facts(whole).has_backing
    assert disk_facts(overlay).has_backing


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"\x7fELF" + bytes(100)], ids=["empty", "cut", "other"])
def test_what_is_no_qcow2_is_refused(tmp_path, content):
    path = tmp_path / "disk.qcow2"
    path.write_bytes(content)
    with pytest.raises(NoImage, match="qemu-img convert"):
        disk_facts(path)


def test_a_disk_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(NoImage, match=r"gone\.qcow2"):
        disk_facts(tmp_path / "gone.qcow2")
