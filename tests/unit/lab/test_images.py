# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which kernel and modules the box gets, and what is said when there are none."""

from pathlib import Path

import pytest

from kvmi_host.host import HostError
from kvmi_host.host.kernels import Series
from kvmi_host.lab import images, paths
from kvmi_host.lab.errors import LabError


def test_newest_kernel_with_headers_is_taken(tmp_path: Path) -> None:
    for release in ("6.1.0-9", "6.1.0-56", "6.1.0-13", "6.12.9+deb12", "6.12.117+deb12"):
        (tmp_path / f"linux-headers-{release}-cloud-amd64").mkdir()
    assert images.kernel_release(Series.V6_1, tmp_path) == "6.1.0-56-cloud-amd64"
    assert images.kernel_release(Series.V6_12, tmp_path) == "6.12.117+deb12-cloud-amd64"


@pytest.mark.parametrize(
    ("series", "package"),
    [(Series.V6_1, "linux-headers-cloud-amd64"), (Series.V6_12, "linux-headers-6.12-cloud-amd64")],
)
def test_machine_without_headers_is_told_their_package(tmp_path: Path, series: Series, package: str) -> None:
    with pytest.raises(HostError, match=f"installs {package}"):
        images.kernel_release(series, tmp_path)


def test_stock_modules_are_no_folder() -> None:
    with images.kvm_modules(Series.V6_1, "stock") as built:
        assert built() is None


def test_folder_of_modules_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("kvm.ko", "kvm-amd.ko", "kvm-intel.ko"):
        (tmp_path / name).touch()
    with images.kvm_modules(Series.V6_1, str(tmp_path)) as built:
        assert built() == tmp_path


def test_folder_without_modules_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kvm.ko").touch()
    with images.kvm_modules(Series.V6_1, str(tmp_path)) as built, pytest.raises(LabError, match=r"no kvm-amd\.ko"):
        built()


def test_program_that_is_not_there_is_named_with_its_package() -> None:
    with pytest.raises(HostError, match="apt-get install some-package"):
        paths.program("no-such-program", "some-package")


def test_cache_is_where_xdg_says(own_cache: Path) -> None:
    assert paths.cache_root() == own_cache


def test_package_without_its_tree_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "kvmi_host" / "lab" / "paths.py"))
    with pytest.raises(HostError, match="source tree"):
        paths.project_root()
