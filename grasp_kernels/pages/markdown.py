"""Tables in Markdown, for terminals too."""

from typing import Any

from grasp_kernels.inert import inert, printable


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table, without a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(token: str) -> str:
    """Return a token for a table cell: no cell border, no quote, no invisible character."""
    return inert(printable(token)) or "␣"


def words(tokens: list[dict[str, Any]]) -> str:
    """Join the tokens that `diagnosis.effect.ends` lists, each in code marks."""
    return " ".join(f"`{cell(token['token'])}`" for token in tokens)


def answers_table(adapters: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table of prompts with the answers of the base model and of the adapters.

    Bold words have a probability below 1 % in the base model; `≠` marks a changed answer.

    Args:
        adapters: name -> answers to the same prompts, as `diagnosis.told` returns them.
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
