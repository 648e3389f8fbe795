"""The pages of docs/ as a site: every link and heading it names is there, and so is every command."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shown import ROOT, all_commands


def build(config: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(out)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT), **variables},
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_page_of_commands_has_all_of_them(site: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]*>", "", (site / "commands.html").read_text(encoding="utf-8")))
    names = [name for name, _ in all_commands()]
    assert "data check" in names
    assert [name for name in names if f"exsearch {name}" not in text] == []


def test_a_page_that_opens_needs_nothing_from_elsewhere(site: Path) -> None:
    loaded = (
        r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//|<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//'
    )
    assert [page.name for page in site.glob("*.html") if re.search(loaded, page.read_text())] == []


def test_files_that_are_not_pages_are_links_to_the_repository_or_names(site: Path, tmp_path: Path) -> None:
    assert "../deploy/docker/Dockerfile" not in (site / "clusters.html").read_text(encoding="utf-8")
    done = build(ROOT / "mkdocs.yml", tmp_path / "out", EXSEARCH_REPOSITORY="https://example.org/exsearch/")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/clusters.html").read_text(encoding="utf-8")
    assert 'href="https://example.org/exsearch/blob/main/deploy/docker/Dockerfile"' in page


@pytest.mark.parametrize("link", ["nowhere.md", "index.md#no-such-heading"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, link: str) -> None:
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs/index.md").open("a", encoding="utf-8") as page:
        page.write(f"\n[there]({link})\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "out")
    assert done.returncode != 0 and link.split("#")[0] in done.stderr
