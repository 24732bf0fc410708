#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""One check of kvmi_host.testing.parsers under Atheris: ``coverage_guided.py CHECK [LIBFUZZER_OPTION...] CORPUS...``.

``ci/fuzz`` runs it; with a file in the place of the corpus it tries that one alone.
"""

import os
import sys

import atheris

PARSERS = ["kvmi_host.protocol", "kvmi_host.introspect.greeting", "kvmi_host.testing.peer"]
# libFuzzer's merge starts this program again, with no more than options of its own.
CHECK = "KVMI_HOST_FUZZ_CHECK"

with atheris.instrument_imports(include=PARSERS):
    from kvmi_host.testing.parsers import CHECKS

if sys.argv[1] in CHECKS:
    os.environ[CHECK] = sys.argv.pop(1)
atheris.Setup(sys.argv, CHECKS[os.environ[CHECK]])
atheris.Fuzz()
