"""Options of `grasp-kernels run` from a YAML file, read as if they were typed."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grasp_kernels.cli.options import UsageError
from grasp_kernels.inert import reason
from grasp_kernels.pipeline.config import OPTIONS
from grasp_kernels.pipeline.trainer_options import as_typed, parse


def read_options(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read options of a run from a file; its keys are their names.

    Raises:
        UsageError: a file that is not YAML, or has a key twice; a key that is not an option; a
            value of another type.
    """
    options: dict[str, Any] = {}
    for name, value in _read(path).items():
        try:
            options |= _taken(str(name).replace("-", "_"), value, parser)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from None
    return options


def _taken(name: str, value: Any, parser: argparse.ArgumentParser) -> dict[str, Any]:
    if value is None:
        raise ValueError(f"{name} has no value: give one, or leave it out.")
    typed = name.replace("_", "-")
    words = as_typed(typed, value)
    if name not in (option.name for option in OPTIONS):
        return parse(words)
    if isinstance(value, bool):
        words = [f"--{typed}" if value else f"--no-{typed}"]
    return {name: getattr(parser.parse_args(words), name)}


def _read(path: str) -> dict[Any, Any]:
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"There is no file {path}: check the option --config.")
    text = Path(path).read_bytes()
    try:
        tree, content = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        at = getattr(error, "problem_mark", None)
        wrong = f"line {at.line + 1}: {vars(error)['problem']}" if at else reason(error)
        raise UsageError(f"{path} is not YAML ({wrong}): correct it.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no options: give a line such as max_steps: 200 for each.")
    for names in _keys(tree):
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"{path}: {twice[0]} is there twice: remove one of them.")
    return content


def _keys(node: Any) -> Iterator[list[str]]:
    """Yield the keys of a mapping, and of the mappings in it."""
    if node.id == "mapping":
        yield [str(key.value).replace("-", "_") for key, _ in node.value]
        for _, value in node.value:
            yield from _keys(value)
