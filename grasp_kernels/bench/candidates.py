"""Launch choices worth timing: neighbours of the table's, as far as they fit the part.

Steps are in powers of two for blocks and warps, and by one for stages; `wide` is turned over. The
list is short and always the same, so that a search ends and can be repeated.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import cast

from grasp_kernels.ops.gpu.launch import Part, at_least_16
from grasp_kernels.ops.gpu.tuning import DownKey, GemmKey, Key, TokensKey
from grasp_kernels.ops.lora_linear.triton import down, gemm, tokens

Choice = down.DownTile | tokens.Slab | gemm.Tile

_SCHEDULES = (
    {"num_stages": 1},  # more bytes in flight
    {"num_stages": -1},  # less shared memory: a second program a multiprocessor
    {"num_stages": -2},
    {"num_warps": 1},  # fewer registers a thread, more threads to wait with
    {"num_warps": -1},
)
_MOVES: dict[str, tuple[dict[str, int], ...]] = {
    "down": (
        *_SCHEDULES,
        {"t": 1},  # the factor is loaded for half as many blocks of tokens
        {"t": -1},  # twice as many programs to share the multiprocessors
        {"k": 1},  # longer rows a copy
        {"k": -1},
        {"t": -1, "k": 1},  # the same bytes a stage, in another shape
        {"t": 1, "k": -1},
        {"k": -1, "num_stages": 2},  # the same bytes in flight, in smaller copies
    ),
    "tokens": (
        *_SCHEDULES,
        {"wide": 1},
        {"t": 1},  # half as many steps of the loop
        {"t": -1},
        {"c": 1},  # half as many parts of [dS | D]
        {"c": -1},  # twice as many programs, half the accumulator
        {"t": -1, "c": 1},
        {"t": 1, "c": -1},
        {"c": -1, "num_warps": -1},  # two programs where there was one
        {"t": -1, "num_stages": 2},
    ),
    "gemm": (
        *_SCHEDULES,
        {"j": 1},
        {"j": -1},  # less of the last wave of tiles is idle
        {"t": 1, "j": -1},  # the same tile, lying the other way
        {"t": -1},
        {"t": -1, "j": -1, "num_warps": -1},  # two programs where there was one
        {"i": 1, "num_stages": -1},  # fewer and longer steps of the loop
        {"i": -1, "num_stages": 1},
        {"j": -1, "num_stages": 1},
    ),
}
_WARPS = (2, 4, 8)
_STAGES = range(1, 8)
_BLOCKS = range(16, 257)  # a side of a matrix instruction; a side of a bulk copy
# Of 255 registers a thread the accumulators may take half; operands and addresses need the others.
_ACCUMULATORS = 128
_BARRIERS = 256  # bytes: one barrier a stage and operand, and what aligns the blocks


def table_choice(key: Key, part: Part) -> Choice:
    """What the launcher takes for a key without any tuning."""
    if isinstance(key, DownKey):
        return down.tile_for(part, key.itemsize, key.tma, key.R)
    if isinstance(key, TokensKey):
        return tokens.slab_for(part, key.itemsize, key.R, skinny=key.E > 0, tma=key.tma)
    return gemm.tile_for(part, key.itemsize, key.tma, key.dropout)


def candidates(key: Key, part: Part) -> list[Choice]:
    """The table's choice, then its neighbours that can be launched, each once."""
    table = table_choice(key, part)
    moved = (_moved(table, move) for move in _MOVES[key.kernel])
    fitting = (choice for choice in moved if choice is not None and fits(key, choice, part))
    return list(dict.fromkeys([table, *fitting]))


def _moved(choice: Choice, move: dict[str, int]) -> Choice | None:
    """A choice some steps away, or None where there is none."""
    fields = asdict(choice)
    for name, steps in move.items():
        if name == "wide":
            fields[name] = not fields[name]
        elif name == "num_stages":
            fields[name] += steps
        else:
            fields[name] = fields[name] << steps if steps > 0 else fields[name] >> -steps
    blocks = (fields[name] for name in ("t", "k", "c", "i", "j") if name in fields)
    possible = (
        fields["num_warps"] in _WARPS
        and fields["num_stages"] in _STAGES
        and all(block in _BLOCKS for block in blocks)
    )
    return replace(choice, **fields) if possible else None


def fits(key: Key, choice: Choice, part: Part) -> bool:
    """Whether a program has the memory and the registers, and the pass is the one of the key."""
    threads = 32 * choice.num_warps
    same_pass = not isinstance(key, TokensKey) or tokens.one_read(cast(tokens.Slab, choice), key.E)
    return (
        same_pass
        and shared_memory(key, choice) <= part.shared_memory
        and _accumulated(key, choice) <= _ACCUMULATORS * threads
    )


def _accumulated(key: Key, choice: Choice) -> int:
    """float32 numbers that a program holds at once."""
    if isinstance(choice, down.DownTile):
        return choice.t * choice.r
    if isinstance(choice, gemm.Tile):
        return choice.t * choice.j
    return choice.c * choice.r + choice.t * _skinny_columns(cast(TokensKey, key))


def shared_memory(key: Key, choice: Choice) -> int:
    """Bytes of shared memory that a program takes at most.

    Every stage holds the blocks that the loop loads. Beside them stands what changes its layout
    between registers: a skinny result, the tile that is stored; after the loop the accumulator
    may, in float32 and in the place of the blocks.
    """
    accumulator = 4 * _accumulated(key, choice)
    return _BARRIERS + max(accumulator, _SHARED[key.kernel](key, choice))


def _shared_down(key: DownKey, tile: down.DownTile) -> int:
    return tile.num_stages * (tile.t + tile.r) * tile.k * key.itemsize


def _shared_tokens(key: TokensKey, slab: tokens.Slab) -> int:
    size = key.itemsize
    block = slab.t * slab.c * size
    skinny = _skinny_columns(key) * (slab.c * size + slab.t * 4)
    left = max(2, slab.num_stages) * slab.r * slab.t * size
    return slab.num_stages * block + skinny + left


def _shared_gemm(key: GemmKey, tile: gemm.Tile) -> int:
    stored = tile.t * tile.j * key.itemsize
    if key.accumulate:
        return stored + (tile.t + tile.j) * min(32, at_least_16(key.R)) * key.itemsize
    return tile.num_stages * (tile.t + tile.j) * tile.i * key.itemsize + stored


def _skinny_columns(key: TokensKey) -> int:
    """Columns of the block of `[factor | basis]` in a program."""
    return at_least_16(key.E) if key.E else 0


_SHARED: dict[str, Callable[..., int]] = {
    "down": _shared_down,
    "tokens": _shared_tokens,
    "gemm": _shared_gemm,
}
