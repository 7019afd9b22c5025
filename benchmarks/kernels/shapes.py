"""The shapes of known decoders and of their linear layers.

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


class Decoder(NamedTuple):
    """Sizes as in the published configuration; biases of a family are left out."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_size: int
    layers: int
    vocabulary: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The seven linear layers of a decoder layer that LoRA adapts."""
        hidden, intermediate = self.hidden, self.intermediate
        query, key_value = self.heads * self.head_size, self.key_value_heads * self.head_size
        return (
            Linear("q_proj", hidden, query, False),
            Linear("k_proj", hidden, key_value, False),
            Linear("v_proj", hidden, key_value, False),
            Linear("o_proj", query, hidden, True),
            Linear("gate_proj", hidden, intermediate, False),
            Linear("up_proj", hidden, intermediate, False),
            Linear("down_proj", intermediate, hidden, True),
        )


MODELS: dict[str, Decoder] = {
    "tiny": Decoder(256, 512, 4, 2, 64, 2, 512),
    "qwen2.5-0.5b": Decoder(896, 4864, 14, 2, 64, 24, 151936),
    "qwen2.5-7b": Decoder(3584, 18944, 28, 4, 128, 28, 152064),
    "qwen2.5-32b": Decoder(5120, 27648, 40, 8, 128, 64, 152064),
    "llama-3.2-1b": Decoder(2048, 8192, 32, 8, 64, 16, 128256),
    "llama-3.1-8b": Decoder(4096, 14336, 32, 8, 128, 32, 128256),
    "llama-3.1-70b": Decoder(8192, 28672, 64, 8, 128, 80, 128256),
}
LINEARS = tuple(linear.name for linear in MODELS["tiny"].linears)
WRITERS = tuple(linear.name for linear in MODELS["tiny"].linears if linear.writes)
