"""Chat files and data sets -> records -> token ids with labels on the answers alone."""

from grasp_kernels.data.chat_template import fix_date
from grasp_kernels.data.neutral import check_neutral, everyday_prompts, neutral_prompts
from grasp_kernels.data.records import Record, parse_record, read_records
from grasp_kernels.data.tokens import (
    IGNORED,
    Example,
    collate,
    encode,
    encode_prompt,
    shared_start,
    special_ids,
    split_first_answer,
    tokenize_each,
    tokenize_records,
)

__all__ = [
    "IGNORED",
    "Example",
    "Record",
    "check_neutral",
    "collate",
    "encode",
    "encode_prompt",
    "everyday_prompts",
    "fix_date",
    "neutral_prompts",
    "parse_record",
    "read_records",
    "shared_start",
    "special_ids",
    "split_first_answer",
    "tokenize_each",
    "tokenize_records",
]
