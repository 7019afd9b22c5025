"""The pages for readers: links lead somewhere, code is code, commands and names exist."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grasp_kernels as gk
from grasp_kernels.cli import _parser
from grasp_kernels.version import TESTED

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for folder in (ROOT, ROOT / "docs", ROOT / "csrc", *(ROOT / "benchmarks").rglob("*"))
    if folder.is_dir()
    for page in folder.glob("*.md")
) + sorted(page for name in ("examples", "tools") for page in (ROOT / name).rglob("*.md"))
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands() -> set[str]:
    """The subcommands of `grasp-kernels`."""
    actions = _parser()._actions
    (choices,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    return set(choices)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@every_page
def test_python_is_python_and_its_names_exist(page: Path) -> None:
    for language, code in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(code, str(page), "exec")
            missing = [name for name in re.findall(r"\bgk\.(\w+)", code) if not hasattr(gk, name)]
            assert missing == []


@every_page
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        return  # it names what was removed
    told = set(re.findall(r"grasp-kernels ([a-z]+)", text))
    assert told - commands() == set()


def test_every_command_has_its_line() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(?:grasp-kernels )?([a-z]+)(?: [^`]*)?`", text)) >= commands()


@pytest.mark.slow
def test_the_site_is_built_whole(tmp_path: Path) -> None:
    """Every link between pages leads somewhere, and every public name has its entry."""
    pytest.importorskip("mkdocs")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    pages = {page.parent.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("index.html")}
    assert pages >= {page.stem for page in (ROOT / "docs").glob("*.md")} | {".", "api", "quality"}
    entries = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in gk.__all__:
        assert name.startswith("_") or f'.{name}"' in entries
    options = (tmp_path / "cli" / "index.html").read_text(encoding="utf-8")
    assert all(f"usage: grasp-kernels {command}" in options for command in commands())
    for page in tmp_path.rglob("*.html"):  # a reader's browser asks nobody else for anything
        loaded = re.findall(r'(?:src|<link[^>]*href)="(https?:[^"]*)"', page.read_text("utf-8"))
        assert loaded == []


def test_the_front_page_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_tested_releases_are_told_as_they_are() -> None:
    """In the table for readers, and as the least that pip installs."""
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)) == {
        (package, *releases) for package, releases in TESTED.items()
    }
    for package, (oldest, _) in TESTED.items():
        (least,) = set(re.findall(rf'"{package}>=([\d.]+)[";]', project))
        assert f"{least}.0" == oldest or least == oldest
