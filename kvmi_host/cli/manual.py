# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages, section 1: ``python -m kvmi_host.cli.manual TREE FOLDER`` writes kvmi-host.1 and one for each verb.

What commands and options there are, and what they do, is what ``--help`` says; docs/man/sections.toml has what belongs
to a page beyond that. Examples are the commands of the operator's guide that have a comment above them.
"""

from __future__ import annotations

import os
import re
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from kvmi_host import __version__
from kvmi_host.cli import app

PROGRAM = "kvmi-host"
_GUIDE = "docs/operating.md"
_SECTIONS = "docs/man/sections.toml"
_EXIT_STATUS = {
    "0": "It is done.",
    "1": "It failed, and one line on standard error says why.",
    "2": "It was called in a way that there is not.",
    "3": "The host cannot do it until someone changes the host: see kvmi-host-doctor(1).",
}


def pages(tree: Path) -> Iterator[tuple[str, str]]:
    """Each page's file name and text.

    :param tree: of the sources, for the guide and the further sections.
    """
    sections = tomllib.loads((tree / _SECTIONS).read_text())
    guide = (tree / _GUIDE).read_text()
    root: Any = typer.main.get_command(app)
    verbs = {name: root.get_command(None, name) for name in root.list_commands(None)}
    references = [f"{PROGRAM}-{verb}(1)" for verb in verbs]
    for verb, command in [("", root), *verbs.items()]:
        name = f"{PROGRAM}-{verb}" if verb else PROGRAM
        more = sections["pages"].get(name, {})
        see_also = [*more.get("see_also", ()), *([f"{PROGRAM}(1)"] if verb else references)]
        lines = [
            *_head(name, 1, _summary(command)),
            *_commands(f"{PROGRAM} {verb}".strip(), command, more.get("text", "")),
            *(_verbs(verbs) if not verb else ()),
            ".SH EXIT STATUS",
            *_terms(_EXIT_STATUS),
            *_section("ENVIRONMENT", {key: sections["environment"][key] for key in more.get("environment", ())}),
            *_section("FILES", more.get("files", {})),
            *_examples(examples(guide, verb)),
            ".SH SEE ALSO",
            ",\n".join(_reference(page) for page in sorted(set(see_also))),
        ]
        yield f"{name}.1", "\n".join(lines) + "\n"


def examples(guide: str, verb: str) -> list[tuple[str, str]]:
    """What the guide does with a verb: the comment above a command of one of its shell blocks, and the command."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    found = []
    for block in blocks:
        lines = block.replace("\\\n", "").splitlines()
        for comment, command in pairwise(lines):
            if verb and comment.startswith("# ") and re.match(rf"{PROGRAM} {verb}\b", command):
                found.append((comment.removeprefix("# "), re.sub(r" {2,}", " ", command)))
    return found


def _head(name: str, section: int, summary: str) -> Iterator[str]:
    when = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    yield f".\\\" Written by python -m kvmi_host.cli.manual from the commands' help, {_SECTIONS} and {_GUIDE}."
    yield f'.TH {name.upper()} {section} "{time.strftime("%Y-%m-%d", when)}" "{PROGRAM} {__version__}"'
    yield from (".SH NAME", f"{_text(name)} \\- {_text(summary)}")


def _commands(called: str, command: Any, text: str) -> Iterator[str]:
    """SYNOPSIS, DESCRIPTION and OPTIONS; of a verb that has verbs, those of each."""
    verbs: Mapping[str, Any] = getattr(command, "commands", {})
    yield ".SH SYNOPSIS"
    if verbs:
        for number, (verb, sub) in enumerate(verbs.items()):
            yield from ([".br"] if number else [])
            yield _synopsis(f"{called} {verb}", sub)
    else:
        yield _synopsis(called, command)
    yield ".SH DESCRIPTION"
    yield from _paragraphs(f"{command.help or ''}\n\n{text}")
    if verbs:
        yield ".SH COMMANDS"
        for verb, sub in verbs.items():
            yield f".SS {_text(f'{called} {verb}')}"
            yield from _paragraphs(sub.help or "")
            yield from _options(sub)
    else:
        yield ".SH OPTIONS"
        yield from _options(command)


def _verbs(verbs: Mapping[str, Any]) -> Iterator[str]:
    yield ".SH COMMANDS"
    yield from _terms({f"{PROGRAM}-{verb}(1)": _summary(command) + "." for verb, command in verbs.items()})


def _synopsis(called: str, command: Any) -> str:
    words = [f"\\fB{_text(called)}\\fR"]
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    if hasattr(command, "list_commands"):
        words += ["[\\fIOPTION\\fR...]", "\\fICOMMAND\\fR", "..."]
        arguments = []
    elif len(command.params) > len(arguments):
        words.append("[\\fIOPTION\\fR...]")
    for argument in arguments:
        name = _text(_metavar(argument).strip("[].").removesuffix("..."))
        many = "..." if argument.nargs != 1 else ""
        words.append(f"\\fI{name}\\fR{many}" if argument.required else f"[\\fI{name}\\fR{many}]")
    return " ".join(words)


def _options(command: Any) -> Iterator[str]:
    for param in sorted(command.params, key=lambda param: param.param_type_name):  # arguments come first
        if getattr(param, "hidden", False):
            continue
        if param.param_type_name == "argument":
            term = f"\\fI{_text(_metavar(param))}\\fR"
        else:
            names = ", ".join(f"\\fB{_text(name)}\\fR" for name in [*param.opts, *param.secondary_opts])
            term = names if param.is_flag else f"{names} \\fI{_text(_metavar(param))}\\fR"
        yield from (".TP", term)
        yield _text(" ".join([*(param.help or "").split(), *_facts(param)]))
    yield from (".TP", "\\fB\\-h\\fR, \\fB\\-\\-help\\fR", "Show what there is, and exit.")


def _metavar(param: Any) -> str:
    if param.metavar:
        return str(param.metavar)
    if choices := getattr(param.type, "choices", None):
        return "|".join(str(getattr(choice, "value", choice)) for choice in choices)
    if param.param_type_name == "argument":
        return str(param.name).upper()
    kind = str(param.type.name).removesuffix(" range")
    return "NUMBER" if kind in {"int", "integer", "float"} else "PATH" if kind == "path" else "TEXT"


def _facts(param: Any) -> Iterator[str]:
    """What there is to know of a parameter besides its help."""
    shown, default = getattr(param, "show_default", None), param.default
    if isinstance(shown, str):
        yield f"Default: {shown}."
    elif default not in (None, False, ...) and not callable(default) and param.param_type_name == "option":
        yield f"Default: {getattr(default, 'value', default)}."
    if param.envvar:
        names = [param.envvar] if isinstance(param.envvar, str) else param.envvar
        yield f"Environment: {', '.join(names)}."


def _summary(command: Any) -> str:
    """The first sentence of a command's help, as the line under NAME has it."""
    first = re.split(r"\.(?:\s|$)", " ".join((command.help or "").split()), maxsplit=1)[0]
    return first[:1].lower() + first[1:] if first[1:2].islower() else first


def _section(title: str, terms: Mapping[str, str]) -> Iterator[str]:
    if terms:
        yield f".SH {title}"
        yield from _terms(terms)


def _terms(terms: Mapping[str, str]) -> Iterator[str]:
    for term, meaning in terms.items():
        yield from (".TP", f"\\fB{_text(term)}\\fR", _text(meaning))


def _examples(found: Sequence[tuple[str, str]]) -> Iterator[str]:
    if found:
        yield ".SH EXAMPLES"
    for what, command in found:
        yield from (".TP", _text(what), f"\\fB{_text(command)}\\fR")


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(filter(None, (part.strip() for part in text.split("\n\n")))):
        yield from ([".PP"] if number else [])
        yield _text(" ".join(paragraph.split()))


def _reference(page: str) -> str:
    name, _, section = page.rstrip(")").partition("(")
    return f"\\fB{_text(name)}\\fR({section})"


def _text(text: str) -> str:
    """Text as roff takes it, on one line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("^", "\\(ha")
    escaped = escaped.replace("~", "\\(ti")
    return f"\\&{escaped}" if not escaped or escaped[0] in ".'" else escaped


def main(arguments: Iterable[str]) -> None:
    """Write the pages of a tree into a folder."""
    tree, folder = map(Path, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages(tree):
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
