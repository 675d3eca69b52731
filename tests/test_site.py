"""The site of the documentation: links as they have to be, the reference made of docstrings.

Where mkdocs is not installed (the extra ``docs``), what takes the site itself is skipped: CI runs
this file once with it, and by itself, without the ``conftest.py`` of the others.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import stepflow_runtime
from docs.website import hooks

ROOT = Path(__file__).parent.parent
TEST = "test_a_link_to_a_test_leads_to_its_line"
needs_mkdocs = pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("mkdocstrings")),
    reason="mkdocs is not installed",
)


def test_a_link_to_a_test_leads_to_its_line() -> None:
    link = f'[shown]({{}}/tests/test_site.py "{TEST}")'
    line = Path(__file__).read_text().splitlines().index(f"def {TEST}() -> None:") + 1
    rewritten = hooks.rewritten(link.format("../.."), "explanation/security.md")
    assert rewritten == (
        f'[shown](../source/tests/test_site.py.md#line-{line} "{TEST}")'
    )


def test_a_name_that_nobody_defines_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    link = '[shown](../tests/test_site.py "test_of_nothing")'
    with caplog.at_level(logging.WARNING, "mkdocs"):
        hooks.rewritten(link, "architecture.md")
    assert "test_of_nothing" in caplog.text


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        (
            "index.md",
            "../README.md#limits-honestly",
            "project/readme.md#limits-honestly",
        ),
        ("how-to/runs.md", "../../CHANGELOG.md", "../project/changelog.md"),
        ("how-to/runs.md", "../durability.md#a", "../durability.md#a"),
        ("project/readme.md", "docs/how-to/index.md", "../how-to/index.md"),
        ("project/readme.md", "docs/images/report.png", "../images/report.png"),
        ("index.md", "examples/pages.yaml", "source/docs/examples/pages.yaml.md"),
        ("index.md", "../LICENSE", "source/LICENSE.md"),
        ("index.md", "nothing.md", "nothing.md"),  # mkdocs tells of it
        ("index.md", "https://stepflow.org", "https://stepflow.org"),
    ],
)
def test_a_link_of_the_repository_leads_to_a_page(
    page: str, link: str, leads_to: str
) -> None:
    assert hooks.rewritten(f"[words]({link})", page) == f"[words]({leads_to})"


def test_files_that_are_linked_to_and_are_no_pages_become_some() -> None:
    pages = {
        "index.md": "[a](tutorial.md) [b](../LICENSE) [c](https://stepflow.org)",
        "project/readme.md": "[d](docs/examples/pages.yaml) ![e](docs/images/report.png)",
    }
    assert hooks.linked_sources(pages) == {"LICENSE", "docs/examples/pages.yaml"}


@needs_mkdocs
def test_roles_become_links_or_code_and_blocks_are_fenced() -> None:
    from docs.website.docstrings import markdown

    places = {"start": "x.Y.start", "a.b.Y": "x.Y"}
    text = (
        "Made by :meth:`start`, of :class:`~a.b.Y`; see :func:`other`::\n"
        "\n"
        "    if x:\n"
        "        y::z\n"
        "\n"
        "and on."
    )
    assert markdown(text, places.get) == (
        "Made by [`start`][x.Y.start], of [`Y`][x.Y]; see `other`:\n"
        "\n"
        "```python\n"
        "if x:\n"
        "    y::z\n"
        "```\n"
        "\n"
        "and on."
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Text(HTMLParser):
    """A page's words, but for those of code, its anchors, and what it loads and links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words = ""
        self.ids: set[str] = set()
        self.loads: set[str] = set()
        self.links: set[str] = set()
        self._inside: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        if tag == "a":
            self.links.add(values.get("href", ""))
        else:
            self.loads |= {values[name] for name in ("src", "href") if name in values}
        if tag in ("code", "pre", "script", "style"):
            self._inside.append(tag)
            self.words += "…"

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.words += data


@needs_mkdocs
def test_the_reference_has_a_place_for_each_name_and_no_markup_is_left(
    site: Path,
) -> None:
    pages = [Text(page) for page in (site / "reference").glob("*.html")]
    ids = set().union(*(page.ids for page in pages))
    names = stepflow_runtime.__all__
    assert [name for name in names if f"stepflow_runtime.{name}" not in ids] == []
    assert {
        f"stepflow_runtime.StepflowExecutor.{call}" for call in ("run", "events")
    } < ids
    for page in pages:
        left = re.search(r":\w+:…|:(?:param|ivar|raises|returns?)\b|::|`", page.words)
        assert left is None, page.words[left.start() - 80 : left.end() + 40]


@needs_mkdocs
def test_the_site_takes_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        remote = {each for each in Text(page).loads if "//" in each}
        assert remote == set(), page
    for style in site.rglob("*.css"):
        assert "//fonts." not in style.read_text(encoding="utf-8")
    assert (site / "search" / "search_index.js").exists()


@needs_mkdocs
def test_a_link_to_a_line_finds_it(site: Path) -> None:
    security = site / "explanation" / "security.html"
    lines = [each for each in Text(security).links if "#line-" in each]
    assert len(lines) > 10
    for each in lines:
        page, _, line = each.partition("#")
        assert line in Text((security.parent / page).resolve()).ids, each
