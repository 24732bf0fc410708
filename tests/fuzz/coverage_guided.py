# SPDX-License-Identifier: LGPL-2.1-or-later
"""One check of kvmi_host.testing.parsers under Atheris: ``coverage_guided.py CHECK [LIBFUZZER_OPTION...] CORPUS...``.

``ci/fuzz`` runs it; with a file in the place of the corpus it tries that one alone.
"""

import sys

import atheris

PARSERS = ["kvmi_host.protocol", "kvmi_host.introspect.greeting", "kvmi_host.testing.peer"]

with atheris.instrument_imports(include=PARSERS):
    from kvmi_host.testing.parsers import CHECKS

atheris.Setup([sys.argv[0], *sys.argv[2:]], CHECKS[sys.argv[1]])
atheris.Fuzz()
