"""Options of `transformers.TrainingArguments` that a run takes beside its own.

Checked by the parser that transformers makes for command lines, wherever they come from.
"""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS
from collections.abc import Sequence
from typing import Any, NoReturn, get_type_hints

# What would lead two trainings apart, or keep one from being resumed, and what a run does itself.
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
    """An option as it is typed."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Read options of `TrainingArguments` as they are typed: the values of those that are given.

    Raises:
        ValueError: an option that is unknown, or of another type.
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
