"""What stands in the repository, as pages of the site.

Documents link to each other, to sources, and to tests by name, as a forge shows them: by
relative paths. There is no address of a repository that a site could point to, so that

- documents beside ``docs/`` (the README, the changelog ...) are pages of the site, and
- a file that is linked to, and is no page, becomes one: its text, with a number and an anchor
  for each line. ``[words](../../tests/test_x.py "test_name")`` leads to the line that defines
  ``test_name``.

Links are rewritten before mkdocs looks at them, so one that leads nowhere, or to a name that
nobody defines, is a warning, which ``--strict`` makes an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parent.parent.parent
# Where they are in the site.
DOCUMENTS: Final = {
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
}
_ORIGINS: Final = {page: file for file, page in DOCUMENTS.items()}
_LINK: Final = re.compile(r'\]\(([^)\s#]+)(#[^)\s]*)?(?: "([^"]*)")?\)')
_SHOWN_AS_IT_IS: Final = {".md", ".png", ".svg"}

# mkdocs counts the warnings of its own loggers.
_log = logging.getLogger("mkdocs.hooks.website")


def page_of(file: str) -> str:
    """Where a file of the repository is in the site."""
    if file in DOCUMENTS:
        return DOCUMENTS[file]
    if Path(file).suffix in _SHOWN_AS_IT_IS:
        return file.removeprefix("docs/")
    return f"source/{file}.md"


def origin_of(page: str) -> str:
    """Which file of the repository a page is made of."""
    return _ORIGINS.get(page) or f"docs/{page}"


def linked_file(origin: str, target: str) -> str | None:
    """The file of the repository that a link in another one leads to, if there is one."""
    file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    return file if (ROOT / file).is_file() else None


def rewritten(markdown: str, page: str) -> str:
    """A page's text with links that lead to the pages of the site."""
    return _LINK.sub(partial(_rewritten_link, page), markdown)


def _rewritten_link(page: str, link: re.Match[str]) -> str:
    target, anchor, title = link.groups()
    file = linked_file(origin_of(page), target)
    if file is None:
        return link[0]
    there = page_of(file)
    if title and there.startswith("source/"):
        anchor = f"#line-{line_of(title, file)}"
    words = f' "{title}"' if title else ""
    return (
        f"]({posixpath.relpath(there, posixpath.dirname(page))}{anchor or ''}{words})"
    )


def line_of(name: str, file: str) -> int:
    """The line of a file that defines a function, a class or a constant."""
    definition = re.compile(
        rf"\s*(?:async )?(?:def |class )?{re.escape(name)}\b[\s(:=]"
    )
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if definition.match(line):
            return number
    _log.warning("%s defines no %s, to which a page links", file, name)
    return 1


def linked_sources(pages: dict[str, str]) -> set[str]:
    """The files that pages, whose texts are given, link to, and that are none."""
    files = {
        linked_file(origin_of(page), link[1])
        for page, text in pages.items()
        for link in _LINK.finditer(text)
    }
    return {file for file in files if file and page_of(file).startswith("source/")}


def source_page(file: str) -> str:
    """A page with the text of a file: a heading, and lines with anchors."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_for_filename

    text = (ROOT / file).read_text(encoding="utf-8")
    formatter = HtmlFormatter(
        cssclass="highlight source", linenos="inline", linespans="line"
    )
    html = highlight(text, get_lexer_for_filename(file, stripnl=False), formatter)
    return f"---\nsearch: {{exclude: true}}\n---\n\n# `{file}`\n\n{html}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of files outside of ``docs/``."""
    from mkdocs.structure.files import File, InclusionLevel

    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for name, page in DOCUMENTS.items():
        texts[page] = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[page]))
    for source in sorted(linked_sources(texts)):
        files.append(
            File.generated(
                config,
                page_of(source),
                content=source_page(source),
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
        )
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Has a page's links lead to pages of the site."""
    uri = page.file.src_uri
    return markdown if uri.startswith("source/") else rewritten(markdown, uri)
