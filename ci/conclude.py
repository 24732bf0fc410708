# SPDX-License-Identifier: LGPL-2.1-or-later
"""conclude.py REPORT "PART SECONDS STATUS"...: what a night came to, from its parts' exit statuses. See ci/nightly.

The suite's page and junit.xml are told what ran beside it: a part that failed is a failed test. Where the suite left no
page, there is a plain one that says why: also where nothing of this tree can be imported. summary.md has it all in
short. Exit status: 0 if every part ran and passed.
"""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Nightly: failed</title>
<style>:root {{ color-scheme: light dark }} body {{ font: 1rem/1.5 system-ui; max-width: 60rem; margin: 2rem auto;
padding: 0 1rem }} pre {{ overflow-x: auto }}</style>
<header><h1>The night failed: there is no report of the suite</h1></header>
<p>The end of <a href="nightly.log">nightly.log</a>:</p>
<pre>{log}</pre>
</html>
"""


def conclude(report: Path, parts: list[tuple[str, int, str]]) -> int:
    """Complete a night's folder.

    :param parts: name, seconds, and the exit status or ``not-run`` of each.
    :return: the night's exit status.
    """
    log = "\n".join((report / "nightly.log").read_text(errors="replace").splitlines()[-40:])
    page, results = report / "index.html", report / "junit.xml"
    if not page.exists():
        page.write_text(PAGE.format(log=html.escape(log)))
    has_night = (report / "night.json").exists()
    # What failed in the suite is in its report, test by test.
    beside = [part for part in parts if part[0] != "suite" or not has_night]
    failures = {f"test_{name}": f"{name}: {outcome(status)}" for name, _, status in beside if status != "0"}
    if results.exists():
        from kvmi_host.lab import junit

        for name, message in failures.items():
            junit.add_failure(results, "nightly", name, message, log)
    else:
        write_junit(failures, log, results)
    if beside:
        said = "; ".join(f"{name} {outcome(status)}" for name, _, status in beside)
        note = f'<p>{"Beside the suite: " if has_night else ""}{said} (<a href="nightly.log">nightly.log</a>).</p>'
        page.write_text(page.read_text().replace("</header>", f"{note}\n</header>", 1))
    summary = "\n".join(["## The night", "", *table(("Part", "Came to", "Took"), parts_rows(parts)), *hosts(report)])
    (report / "summary.md").write_text(summary + "\n")
    sys.stdout.write(f"\n{summary}\n\n{page}\n")
    return int(any(status != "0" for _, _, status in parts))


def write_junit(failures: dict[str, str], log: str, results: Path) -> None:
    """A report of these failures alone."""
    count = str(len(failures))
    suite = Element("testsuite", name="nightly", tests=count, failures=count)
    for name, message in failures.items():
        SubElement(SubElement(suite, "testcase", classname="nightly", name=name), "failure", message=message).text = log
    ElementTree(suite).write(results, encoding="utf-8", xml_declaration=True)


def outcome(status: str) -> str:
    return {"0": "passed", "not-run": "was not run"}.get(status, f"failed with status {status}")


def parts_rows(parts: list[tuple[str, int, str]]) -> list[tuple[str, ...]]:
    return [(name, outcome(status), f"{seconds // 60} min {seconds % 60} s") for name, seconds, status in parts]


def hosts(report: Path) -> list[str]:
    """A table of the hosts; none where the suite left nothing that can be read."""
    try:
        night = json.loads((report / "night.json").read_text())
        rows = [(run["name"], run["state"], run["reason"] or " ".join(run["warnings"])) for run in night["hosts"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return ["", *table(("Host", "State", ""), rows)]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A table in Markdown; what hosts say cannot leave its cell."""
    cells = [[html.escape(" ".join(str(cell).split())).replace("|", "&#124;") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]


if __name__ == "__main__":
    found = [part.split() for part in sys.argv[2:]]
    sys.exit(conclude(Path(sys.argv[1]), [(name, int(seconds), status) for name, seconds, status in found]))
