"""`grasp-kernels run`: both trainings and the report."""

import argparse
import warnings
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_type_hints

from grasp_kernels import processes
from grasp_kernels.cli.options import UsageError, add_command, number_of_directions
from grasp_kernels.inert import reason
from grasp_kernels.pipeline.config import OPTIONS, RunConfig
from grasp_kernels.pipeline.trainer_options import as_typed, parse


def add_run(commands: Any) -> None:
    parser = add_command(
        commands,
        "run",
        _run,
        "fine-tune, fine-tune again without changing other answers, and report both",
        allow_abbrev=False,
        epilog="Any other option of transformers.TrainingArguments is accepted by its name, such "
        "as --adam-beta2 .95, unless the run sets it itself.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with options by their names, such as max_steps: 200; options on the "
        "command line replace them",
    )
    hints = get_type_hints(RunConfig)
    for option in OPTIONS:
        text, choices = option.metadata["help"], option.metadata["choices"]
        if option.default is not MISSING and option.default is not None:
            listed = option.default if isinstance(option.default, tuple) else [option.default]
            text += f" (default: {' '.join(map(str, listed))})"
        settings = _VALUES[hints[option.name]] if choices is None else {"choices": choices}
        parser.add_argument(f"--{option.name.replace('_', '-')}", help=text, **settings)
    parser.set_defaults(
        parser=parser,
        further=None,  # options that are not those of a run
        when_stopped="the same command continues from the last checkpoint.",
    )


# None of them has a default here, so that options that were typed can be told from the others.
_VALUES: dict[Any, dict[str, Any]] = {
    bool: {"action": argparse.BooleanOptionalAction},
    str: {"metavar": "NAME"},
    str | None: {"metavar": "FILE"},
    int: {"type": int, "metavar": "N"},
    int | None: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    int | Literal["auto"]: {"type": number_of_directions, "metavar": "N"},
    tuple[str, ...]: {"nargs": "+", "metavar": "NAME"},
}


def _run(arguments: argparse.Namespace) -> int:
    """Fine-tune a model on chat data, and again so that it answers everything else as before.

    The report shows the answers of both adapters. After a stop at any point, the same command
    continues from the last checkpoint.
    """
    config = _configured(arguments)
    quieten()
    from grasp_kernels.pipeline.folder import RunFolder
    from grasp_kernels.pipeline.report_text import hardly_learned, verdict_sentence
    from grasp_kernels.pipeline.stages import run

    finished = RunFolder(config.output).is_finished
    report = run(config)
    if processes.index() > 0:
        return 0  # the first process says it
    if finished:
        print("This run had already finished; nothing was done.")
    for name, adapter in report.numbers["adapters"].items():
        print(verdict_sentence(name, adapter))
    for sentence in hardly_learned(report.numbers):
        print(sentence)
    print(f"Adapters: {report.naive} and {report.retrained}.")
    print(f"Report:   {report.page} (as text {report.text.name})")
    return 0


def _configured(arguments: argparse.Namespace) -> RunConfig:
    """Return the options of the file, replaced by options that were typed."""
    parser, own = arguments.parser, [option.name for option in OPTIONS]
    typed = {name: getattr(arguments, name) for name in own}
    options = _read_options(arguments.config, parser) if arguments.config else {}
    options |= {name: value for name, value in typed.items() if value is not None}
    if arguments.further:
        try:
            options |= parse(arguments.further)
        except ValueError as error:
            parser.error(str(error))
    vars(arguments).update({**options, **vars(arguments)})  # for the names in messages
    if missing := [f"--{name}" for name in ("model", "data", "output") if name not in options]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    further = {name: options.pop(name) for name in sorted(options.keys() - set(own))}
    return RunConfig(**options, training_arguments=further)


def _read_options(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read options of a run from a YAML file, as if they were typed; its keys are their names."""
    options: dict[str, Any] = {}
    for name, value in _read(path).items():
        if value is None:
            raise UsageError(f"{path}: {name} has no value: give one, or leave it out.")
        words = as_typed(name.replace("_", "-"), value)
        try:
            if name not in (option.name for option in OPTIONS):
                options |= parse(words)
                continue
            if isinstance(value, bool):
                words = [f"--{'' if value else 'no-'}{name.replace('_', '-')}"]
            options[name] = getattr(parser.parse_args(words), name)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from None
    return options


def _read(path: str) -> dict[str, Any]:
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
    names = [str(key.value).replace("-", "_") for key, _ in tree.value]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{path}: {twice[0]} is there twice: remove one of them.")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def quieten() -> None:
    """Hide warnings of libraries that are meant for programmers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and writing files
