"""What mkdocs adds to the pages: the front page, options of all commands, public names, a figure.

Links to files of the repository that are no pages become their names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_ELSEWHERE = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|#)([^)]+)\)")
_IMAGE = re.compile(r"(!\[[^\]]*\])\((?!https?://)([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and the images that pages of the repository show."""
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    quality = (ROOT / "benchmarks/quality/smollm2/README.md").read_text(encoding="utf-8")
    pages = {"index.md": front, "quality.md": quality, "api.md": _api()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=_within(text)))
    for image in {path for text in pages.values() for _, path in _IMAGE.findall(text)}:
        source = ROOT / image
        files.append(File.generated(config, source.name, content=source.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add the options of all commands, and name files that are no pages."""
    if page.file.src_uri == "cli.md":
        markdown += _help()
    return _within(markdown)


def _within(text: str) -> str:
    """The same text with links between pages alone, and images beside it."""
    text = _IMAGE.sub(lambda found: f"{found[1]}({Path(found[2]).name})", text)
    return _ELSEWHERE.sub(_link, text)


def _link(found: re.Match[str]) -> str:
    text, target = found[1], found[2].removeprefix("docs/")
    if (ROOT / "docs" / target.partition("#")[0]).is_file():
        return f"[{text}]({target})"
    return f"{text} (`{target.removeprefix('../')}`)"


def _api() -> str:
    import grasp_kernels as gk

    names = [name for name in gk.__all__ if not name.startswith("_")]
    blocks = [f"::: {getattr(gk, name).__module__}.{name}" for name in names]
    return "\n\n".join(["# Public names", "All of them are `gk.NAME`.", *blocks]) + "\n"


def _help() -> str:
    import argparse

    from grasp_kernels.cli import _parser

    actions = _parser()._actions
    (commands,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    blocks = [
        f"## {name}\n\n```text\n{parser.format_help()}```\n" for name, parser in commands.items()
    ]
    return "\n" + "\n".join(blocks)
