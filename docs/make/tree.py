# SPDX-License-Identifier: LGPL-2.1-or-later
"""The site has the tree's own folders: `docs/operating.md` is at `docs/operating.html`, and `kernel/README.md` is a
page of it, too. So a link from one file to another means the same in the site as in a forge's view of the tree, and
MkDocs checks both at once.

A hook of MkDocs; mkdocs.yml names it. The pages of the API reference are made here, for there is nothing in them but a
package's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(?:#[^)]*)?\)")
API = "docs/api/"

# How Sphinx writes what Markdown does not know, in docstrings.
_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):<code>~?([\w.]+)</code>")
_LITERAL = re.compile(r"(<p>)?::</p>(?=\s*<(?:pre|div))")
_TAG = re.compile(r"<[^>]+>")
_TABLE = re.compile(r"<p>(=+ +=+\n.*?)</p>", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put what is below docs/ where it is in the tree, and add what it links to."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            if file.inclusion is not InclusionLevel.EXCLUDED:
                files.append(_file(f"docs/{file.src_uri}", config))
    for page in _pages(config.nav):
        if page.startswith(API):
            package = page.removeprefix(API).removesuffix(".md")
            files.append(File.generated(config, page, content=f"::: {package}\n"))
        elif not page.startswith("docs/") and (ROOT / page).exists():
            files.append(_file(page, config))
    _add_linked(files, config)
    return files


def on_page_content(html: str, **_: object) -> str:
    """Docstrings are written as Sphinx takes them."""
    html = _LITERAL.sub(lambda found: "" if found[1] else ":</p>", html)
    html = _TABLE.sub(lambda found: f"<pre><code>{_TAG.sub('', found[1])}</code></pre>", html)
    return _ROLE.sub(_role, html)


def links(text: str) -> Iterator[str]:
    """The files that a page links to, relative to its folder."""
    return (found[1] for found in LINK.finditer(FENCED.sub("", text)))


def _role(found: re.Match[str]) -> str:
    """A name that is in the reference leads there; any other is just a name."""
    name = found[1]
    return f'<autoref optional identifier="{name}"><code>{name.rpartition(".")[2]}</code></autoref>'


def _file(uri: str, config: MkDocsConfig, inclusion: InclusionLevel = InclusionLevel.INCLUDED) -> File:
    return File(uri, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=inclusion)


def _pages(nav: object) -> Iterator[str]:
    match nav:
        case str():
            yield nav
        case list():
            for item in nav:
                yield from _pages(item)
        case dict():
            for item in nav.values():
                yield from _pages(item)


def _add_linked(files: Files, config: MkDocsConfig) -> None:
    pages = list(files.documentation_pages())
    while pages:
        page = pages.pop()
        for link in links(page.content_string):
            uri = normpath(str(PurePosixPath(page.src_uri).parent / link))
            if files.get_file_from_path(uri) is None and (ROOT / uri).is_file():
                linked = _file(uri, config, InclusionLevel.NOT_IN_NAV)
                files.append(linked)
                if linked.is_documentation_page():
                    pages.append(linked)
