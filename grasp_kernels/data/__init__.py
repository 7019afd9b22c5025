"""Chat files and data sets -> records -> token ids with labels on the answers alone."""

from grasp_kernels.data.records import Record, read_records
from grasp_kernels.data.tokens import (
    IGNORED,
    Example,
    collate,
    encode,
    encode_prompt,
    special_ids,
    split_first_answer,
    tokenize_records,
)

__all__ = [
    "IGNORED",
    "Example",
    "Record",
    "collate",
    "encode",
    "encode_prompt",
    "read_records",
    "special_ids",
    "split_first_answer",
    "tokenize_records",
]
