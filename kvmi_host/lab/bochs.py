# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Intel host: the disk and the kernels of the host in a box under Bochs, whose emulated CPU has VMX.

Bochs is slow and has no network worth the name, so this host is good for one thing: it boots, runs one command, hands
over what that left, and is gone. It boots from an ISO. Its second disk brings this tree there and the results back. Its
first serial line is the kernel's console, its second one the command's output.
"""

from __future__ import annotations

import codecs
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from kvmi_host.host.kernels import Series
from kvmi_host.lab import cache, deploy, images
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.paths import program, project_root, run_dir
from kvmi_host.lab.progress import build, step, tail

SILENCE = 1200
"""Seconds that a host may be silent, unless it is told otherwise."""

_EXCHANGE_SIZE = 128 * 16 * 63 * 512
"""Of the second disk, in bytes: whole cylinders."""

_FIRST_PROCESS = PurePosixPath("/run-command")

# no_timer_check, cryptomgr.notests and the blacklist each save seconds; init gets what the kernel does not know.
_KERNEL_ARGUMENTS = (
    "console=ttyS0,115200 quiet loglevel=5 net.ifnames=0 mitigations=off nokaslr audit=0 no_timer_check "
    "cryptomgr.notests=1 random.trust_cpu=on initcall_blacklist=load_system_certificate_list "
    f"lab_disk=sda lab_init={_FIRST_PROCESS}"
)

_ISOLINUX = f"""DEFAULT lab
PROMPT 0
LABEL lab
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND {_KERNEL_ARGUMENTS}
"""

# ips is how many instructions make a second there, and the TSC's frequency: Bochs does some 40 million in a second of
# ours, but no CPU with VMX was so slow. The display cannot be left out; this one opens a port, which is why Bochs has a
# network namespace of its own.
_BOCHSRC = """config_interface: textconfig
display_library: rfb, options="timeout=0"
cpu: model=corei7_haswell_4770, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none, time0=utc
memory: guest=2048, host=2048
pci: enabled=1, chipset=i440fx
romimage: file={bios}/BIOS-bochs-latest, options=fastboot
vgaromimage: file={bios}/VGABIOS-lgpl-latest
ata0-master: type=disk, mode=volatile, path="{disk}", journal=changes.img, cylinders=0
ata0-slave: type=disk, mode=flat, path=exchange.img, cylinders=0
ata1-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=console.log
com2: enabled=1, mode=file, dev=output.log
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
"""


def _first_process(command: str, wanted: Sequence[str]) -> bytes:
    """The script that the initramfs starts: the command, its results to the second disk, and the end."""
    return f"""#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
stty -F /dev/ttyS1 115200 raw
{deploy.linux(deploy.TOP / "images")}
( {command}; echo $? > /status ) 2>&1 | cat > /dev/ttyS1
tar -c -P -f /dev/sdb /status {" ".join(wanted)}
sync
echo o > /proc/sysrq-trigger
sleep infinity
""".encode()


class BochsHost:
    """An Intel host that lives as long as one command. Those of different names can run at the same time.

    :param name: as a box's.
    :param kernel: the kernel that it boots.
    :param modules: as a box's.
    :param silence: seconds without a word on either serial line after which it is taken to hang.
    """

    def __init__(
        self, name: str, kernel: Series = Series.V6_1, modules: str | None = None, silence: float = SILENCE
    ) -> None:
        self.name = name
        self._silence = silence
        self._series = kernel
        self._modules = modules
        self._run = run_dir(name, ".bochs")

    @property
    def console_log(self) -> Path:
        """What its kernel writes on the serial console."""
        return self._run / "console.log"

    def run(
        self,
        command: str,
        wanted: Sequence[str],
        on_output: Callable[[str], None],
        programs: Mapping[PurePosixPath, bytes] = MappingProxyType({}),
    ) -> tuple[int, dict[str, bytes]]:
        """Boot it, run a command as root, and end it.

        This tree is there, in :data:`kvmi_host.lab.deploy.TOP`.

        :param command: for its shell.
        :param wanted: files that the command leaves, with their full paths.
        :param on_output: called with each piece of output, of both streams, as it comes.
        :param programs: what else is to be there, executable, by its full path.
        :return: the command's exit status, and the contents of those files that there were.
        :raise LabError: when it does not boot, or hangs, or its kernel panics.
        """
        with images.kvm_modules(self._series, self._modules) as modules_built:
            image = images.host_image()
            modules = modules_built()
        bochs = images.bochs()
        kernel = image.kernel(self._series)
        initrd = images.initrd(kernel, modules)
        script = _first_process(command, wanted)
        archive = deploy.archive(project_root(), images.guest_images(), {**programs, _FIRST_PROCESS: script})
        with cache.locked(f"bochs_{self.name}"):
            for file in self._run.iterdir():
                file.unlink()
            self._make_iso(kernel.image, initrd)
            (self._run / "bochsrc").write_text(_BOCHSRC.format(disk=image.disk, bios=bochs / "root/usr/share/bochs"))
            (self._run / "commands").write_text("c\n")  # for its debugger, which waits otherwise
            with (self._run / "exchange.img").open("wb") as exchange:
                exchange.write(archive)
                exchange.truncate(_EXCHANGE_SIZE)
            self._emulate(bochs / "bochs", on_output)
            return self._results()

    def _make_iso(self, kernel: Path, initrd: Path) -> None:
        xorriso = program("xorriso", "xorriso")
        (self._run / "isolinux.cfg").write_text(_ISOLINUX)
        files = {
            "isolinux.bin": Path("/usr/lib/ISOLINUX/isolinux.bin"),
            "ldlinux.c32": Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"),
            "isolinux.cfg": self._run / "isolinux.cfg",
            "vmlinuz": kernel,
            "initrd": initrd,
        }
        argv = [xorriso, "-as", "mkisofs", "-o", str(self._run / "boot.iso"), "-b", "isolinux.bin", "-c", "boot.cat"]
        argv += ["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-graft-points"]
        build("making the boot medium", [*argv, *(f"{name}={file}" for name, file in files.items())])

    def _emulate(self, bochs: Path, on_output: Callable[[str], None]) -> None:
        """Have Bochs run until the host powers off."""
        # It is not to outlive us; and root in a chroot may have network namespaces, but no user namespaces.
        argv = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--net",
            *([] if os.geteuid() == 0 else ["--map-root-user"]),
        ]
        argv += [str(bochs), "-q", "-f", "bochsrc", "-rc", "commands"]
        with (self._run / "bochs.out").open("wb") as log:
            process = subprocess.Popen(argv, cwd=self._run, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            with ExitStack() as booting:
                booting.enter_context(step(f"booting an Intel host in Bochs ({self.name})"))
                for piece in self._output(process):
                    booting.close()
                    on_output(piece)
        finally:
            process.kill()
            process.wait()

    def _output(self, process: subprocess.Popen[bytes]) -> Iterator[str]:
        """What comes on the second serial line, until Bochs ends.

        :raise LabError: the host will not come to its end.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        output = self._run / "output.log"
        shown, heard, until = 0, 0, time.monotonic() + self._silence
        ended = False
        while not ended:
            # Asked before reading: what came before the end is read below.
            ended = process.poll() is not None
            console = self.console_log.read_bytes() if self.console_log.exists() else b""
            if output.exists():
                with output.open("rb") as file:
                    file.seek(shown)
                    piece = file.read()
                shown += len(piece)
                if piece:
                    yield decoder.decode(piece)
            if len(console) + shown > heard:
                heard, until = len(console) + shown, time.monotonic() + self._silence
            if wrong := re.search(rb"kvmi-lab: failed.*|Kernel panic.*", console):
                raise self._error(wrong[0].decode(errors="replace").strip())
            if time.monotonic() > until:
                raise self._error(f"nothing came on its serial lines for {self._silence:g} s")
            time.sleep(0 if ended else 0.2)

    def _results(self) -> tuple[int, dict[str, bytes]]:
        """What the first process wrote on the second disk."""
        found = {}
        with tarfile.open(self._run / "exchange.img", "r:*") as disk:
            for member in disk:
                if content := disk.extractfile(member):
                    found["/" + member.name.lstrip("/")] = content.read()
        if "/status" not in found:
            raise self._error("it ended without a result")
        return int(found.pop("/status")), found

    def _error(self, what: str) -> LabError:
        said = tail(self._run / "bochs.out", 5)
        log = tail(self._run / "bochs.log", 5)
        return LabError(
            f"the Intel host failed: {what}. Bochs said:\n{said}\n{log}\nThe console's last lines:\n"
            + tail(self.console_log)
        )
