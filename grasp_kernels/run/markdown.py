"""Tables in Markdown that read well in a terminal too."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table without a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(token: str) -> str:
    """A token inside a table cell: no cell border, no quote, nothing invisible."""
    text = token.replace("|", "¦").replace("`", "'")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).strip() or "␣"
