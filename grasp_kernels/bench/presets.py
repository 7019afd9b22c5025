"""Named sets of cases; explicit options win over them."""

from __future__ import annotations

from typing import Any

_LLAMA = ("llama-3.1-8b", "llama-3.1-70b")

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"dtypes": ("bfloat16",), "rounds": 5},
    "llama": {
        "models": _LLAMA,
        "dtypes": ("bfloat16",),
        "tokens": (2048, 8192),
        "basis": (0, 4),
        "providers": ("all",),
    },
    "full": {
        "models": (*_LLAMA, "qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-32b"),
        "dtypes": ("bfloat16",),
        "tokens": (1024, 2048, 4096, 8192, 16384, 32768),
        "ranks": (8, 16, 64, 128),
        "basis": (0, 1, 4, 16),
        "providers": ("all", "peers"),
    },
}
