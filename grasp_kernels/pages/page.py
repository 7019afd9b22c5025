"""Markdown -> one HTML page, which loads nothing and runs nothing."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def page(text: str, figures: Mapping[str, str] | None = None) -> str:
    """Render a report as a page.

    Text from files and models is inert in the Markdown already. Here HTML and links become text
    too, and an image is drawn only if it is in `figures`.

    Args:
        text: the report in Markdown. Its first heading is the title, if it has one.
        figures: path of an image in the Markdown -> the same figure as SVG. Any other image is
            shown as text.
    """
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.disable(["link", "autolink", "html_inline", "html_block", "reference"])
    reader.add_render_rule("image", _figure)
    reader.add_render_rule("td_open", _cell)
    tokens = reader.parse(text)
    _name_cells(tokens)
    body = reader.renderer.render(tokens, reader.options, {"figures": figures or {}})
    headings = (line.lstrip("# ") for line in text.splitlines() if line.startswith("# "))
    title = next(headings, "Report")
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return _TEMPLATE.format(title=escape(title), style=style, body=body)


def _name_cells(tokens: Sequence[Any]) -> None:
    """Give each cell the heading of its column, for narrow screens."""
    headings: list[str] = []
    column = 0
    for i, token in enumerate(tokens):
        if token.type == "thead_open":
            headings = []
        elif token.type == "th_open":
            headings.append(tokens[i + 1].content)
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            token.attrSet("data-column", headings[column])
            column += 1


def _cell(renderer: Any, tokens: Sequence[Any], i: int, options: Any, env: Any) -> str:
    """Mark a cell with a changed answer."""
    if tokens[i + 1].content.endswith("≠"):
        tokens[i].attrSet("class", "changed")
    return str(renderer.renderToken(tokens, i, options, env))


def _figure(renderer: Any, tokens: Sequence[Any], i: int, options: Any, env: Any) -> str:
    """Return the figure in place of its path."""
    return env["figures"].get(tokens[i].attrs["src"], escape(tokens[i].content))
