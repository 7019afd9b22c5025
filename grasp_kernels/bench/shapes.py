"""The linear layers of known decoders.

Shapes: K in, N out.
"""

from __future__ import annotations

from typing import NamedTuple


class Linear(NamedTuple):
    """One adapted linear layer and whether it writes to the residual stream."""

    name: str
    K: int
    N: int
    writes: bool


def _llama(hidden: int, key_value: int, intermediate: int) -> tuple[Linear, ...]:
    return (
        Linear("q_proj", hidden, hidden, False),
        Linear("k_proj", hidden, key_value, False),
        Linear("v_proj", hidden, key_value, False),
        Linear("o_proj", hidden, hidden, True),
        Linear("gate_proj", hidden, intermediate, False),
        Linear("up_proj", hidden, intermediate, False),
        Linear("down_proj", intermediate, hidden, True),
    )


# Hidden size, key/value width and MLP width as in the published configurations.
MODELS: dict[str, tuple[Linear, ...]] = {
    "tiny": _llama(256, 128, 512),
    "qwen2.5-0.5b": _llama(896, 128, 4864),
    "qwen2.5-7b": _llama(3584, 512, 18944),
    "llama-3.2-1b": _llama(2048, 512, 8192),
    "llama-3.1-8b": _llama(4096, 1024, 14336),
    "llama-3.1-70b": _llama(8192, 1024, 28672),
}
