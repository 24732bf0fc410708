# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether QEMU's user can read an image, and what is told when it cannot. Whom the tests speak of is nobody's user."""

import os

import pytest

from kvmi_host.provision import NoImage
from kvmi_host.provision.access import User, obstacle, qemu_user, require_readable

STRANGER = User(4_000_001, 4_000_001)


@pytest.fixture
def image(tmp_path):
    """An image below two folders, all open to everyone."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent.is_relative_to(tmp_path.parents[2]):
            parent.chmod(0o755)
    path = tmp_path / "images/disk.qcow2"
    path.parent.mkdir(mode=0o755)
    path.touch(0o644)
    return path


class Capabilities:
    """A connection to a libvirt that runs QEMU as that user."""

    def __init__(self, label):
        self.label = label

    def getCapabilities(self):  # noqa: N802 # libvirt's name
        label = f"<baselabel type='kvm'>{self.label}</baselabel>" if self.label else ""
        apparmor = "<secmodel><model>apparmor</model><doi>0</doi></secmodel>"
        return f"<capabilities><host>{apparmor}<secmodel><model>dac</model>{label}</secmodel></host></capabilities>"


STRANGE = Capabilities("+4000001:+4000001")


def test_nothing_keeps_a_stranger_from_what_is_open(image):
    assert obstacle(image, STRANGER) is None


def test_a_file_is_an_obstacle_by_its_mode(image):
    image.chmod(0o640)
    assert obstacle(image, STRANGER) == image


def test_a_folder_on_the_way_is_an_obstacle(image):
    image.parent.chmod(0o700)
    assert obstacle(image, STRANGER) == image.parent


def test_a_folder_need_not_be_listed(image):
    image.parent.chmod(0o711)
    assert obstacle(image, STRANGER) is None


def test_what_a_group_may_counts_for_its_members(image):
    image.chmod(0o640)
    member = User(4_000_001, 4_000_001, frozenset({image.stat().st_gid}))
    assert obstacle(image, member) is None


def test_the_owners_bits_count_for_the_owner_even_when_others_may_more(image):
    image.chmod(0o044)
    owner = User(image.stat().st_uid or 4_000_001, 4_000_001)
    os.chown(image, owner.uid, -1)
    assert obstacle(image, owner) == image


def test_it_is_the_file_behind_a_link_that_counts(image, tmp_path):
    link = tmp_path / "link.qcow2"
    link.symlink_to(image)
    image.chmod(0o600)
    assert obstacle(link, STRANGER) == image


def test_libvirt_tells_whom_qemu_runs_as():
    assert qemu_user(STRANGE) == STRANGER
    assert qemu_user(Capabilities("")) is None


def test_an_image_out_of_reach_is_refused_with_what_to_do(image):
    image.parent.chmod(0o700)
    with pytest.raises(NoImage, match=rf"4000001.*cannot read.*chmod o\+x {image.parent}$"):
        require_readable(STRANGE, image)


def test_a_kernel_need_only_be_on_an_open_way(image):
    image.chmod(0o600)
    require_readable(STRANGE, image, by_owner=True)
    with pytest.raises(NoImage, match=r"chmod o\+r"):
        require_readable(STRANGE, image)


def test_where_qemu_is_our_own_user_nothing_is_asked(image):
    image.chmod(0)
    require_readable(Capabilities(""), image)
