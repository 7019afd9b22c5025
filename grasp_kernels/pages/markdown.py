"""Tables in Markdown that read well in a terminal too."""

from __future__ import annotations

from typing import Any

from grasp_kernels.inert import inert, printable


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table without a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(token: str) -> str:
    """A token inside a table cell: no cell border, no quote, nothing invisible."""
    return inert(printable(token)) or "␣"


def words(tokens: list[dict[str, Any]]) -> str:
    """Tokens as `diagnosis.tokens` lists them, one after the other."""
    return " ".join(f"`{cell(token['token'])}`" for token in tokens)


def answers_table(adapters: dict[str, list[dict[str, Any]]]) -> str:
    """Prompts with the answers of the base model and of adapters side by side.

    Bold is what the base model would hardly say (below 1 %); `≠` marks an answer that has changed.

    Args:
        adapters: name -> answers as `diagnosis.told` returns them, to the same prompts.
    """
    rows = []
    for told in zip(*adapters.values(), strict=True):
        own = [_marked(one["adapter"]) + (" ≠" if one["changed"] else "") for one in told]
        rows.append([inert(told[0]["prompt"]), inert(told[0]["base"]), *own])
    return table(["prompt", "base model", *adapters], rows)


def _marked(pieces: list[list[Any]]) -> str:
    parts: list[str] = []
    for text, unlikely in pieces:
        inside = inert(text)
        bold = unlikely and any(c.isalnum() for c in inside)
        space = " " if text[:1].isspace() and parts else ""
        parts.append(f"{space}**{inside}**" if bold else f"{space}{inside}")
    return "".join(parts) or "␣"
