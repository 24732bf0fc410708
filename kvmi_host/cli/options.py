# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options that several verbs take."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from kvmi_host.cli.completion import running_vms
from kvmi_host.host.kernels import Series
from kvmi_host.host.vendor import Vendor

Connect = Annotated[
    str | None,
    typer.Option("-c", "--connect", metavar="URI", envvar="LIBVIRT_DEFAULT_URI", help="libvirt's URI, as virsh's."),
]

Kernel = Annotated[Series, typer.Option(envvar="KERNEL", help="What the host in a box runs; debug: 6.1 with checks.")]


CpuVendor = Annotated[
    Vendor, typer.Option("--cpu", envvar="CPU", help="AMD's SVM, emulated by QEMU, or Intel's VMX, emulated by Bochs.")
]


class Methods(StrEnum):
    """The ways to attach, as :class:`kvmi_host.attach.Method` has them."""

    AUTO = "auto"
    VM_FD = "vm-fd"
    QEMU_OBJECT = "qemu-object"


AttachMethod = Annotated[
    Methods, typer.Option("--method", help="By the VM's descriptor (our modules), or by KVM-VMI's QEMU.")
]

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]

Vm = Annotated[
    str,
    typer.Argument(
        metavar="VM", help="A libvirt name or UUID, or pid:N.", show_default=False, autocompletion=running_vms
    ),
]
