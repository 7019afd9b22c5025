"""Options of `transformers.TrainingArguments` that a run takes in addition to its own.

The parser that transformers makes for command lines checks them, also those from Python or a file.
"""

import json
import re
from argparse import SUPPRESS
from collections.abc import Sequence
from typing import Any, NoReturn, get_type_hints

# Options that would make the two trainings differ in more than the method, or keep a training from
# being resumed, and options that a run sets itself.
OWNED = re.compile(
    r"(output|log|logging|eval|save|hub|push|do|ddp|fsdp|trackio)_.*|.*_eval|.*eval_batch_size"
    r"|.*metric.*|include_.*|greater_is_better|load_best_.*|prediction_loss_only|warmup_ratio|data_seed"
    r"|disable_tqdm|report_to|run_name|project|debug|resume_from_checkpoint|restore_callback_.*"
    r"|ignore_data_skip|enable_jit_checkpoint|dataloader_(drop_last|in_order|pin_memory)"
    r"|auto_find_batch_size|remove_unused_columns|label_names|length_column_name"
    r"|(gradient|activation)_checkpointing.*"
    r"|use_cpu|local_rank|deepspeed|fsdp|(accelerator|parallelism)_config"
)


def as_typed(name: str, value: Any) -> list[str]:
    """Return an option as the words of a command line."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Read options of `TrainingArguments` from words of a command line.

    Returns:
        name -> value of the given options, without defaults.

    Raises:
        ValueError: an unknown option, or a value of another type.
    """
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            message = re.sub(r"^argument |--\w+/(?=--)", "", message).rstrip(".")
            raise ValueError(re.sub(r"^(unrecognized arguments): (.*)", r"\2: \1", message) + ".")

    parser = Parser(TrainingArguments, allow_abbrev=False, add_help=False)
    hints = get_type_hints(TrainingArguments)
    for action in parser._actions:
        action.default = SUPPRESS
        if "dict" in str(hints[action.dest]):
            action.type = json.loads
    return vars(parser.parse_args(words))
