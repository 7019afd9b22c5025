"""The processes of one run, which `torchrun` or `accelerate launch` has started.

Each has a part of every batch, and the whole model; if the launcher asks for FSDP2, a part of every
weight of the base model. The first process writes all files; the others wait for it, and then read
what it wrote.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

_Found = TypeVar("_Found")
_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
# Variables of `accelerate launch`: what a run does, and what it refuses, with the remedy.
_FSDP = "ACCELERATE_USE_FSDP"
_INSTEAD = "use --multi_gpu, or FSDP with fsdp_version: 2 for a model that one GPU cannot hold"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", _INSTEAD),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", _INSTEAD),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism_config", _INSTEAD),
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "leave it out, and give the run a dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "leave it out"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "leave it out, or use more processes"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "leave it out, and give the run the option gradient_checkpointing",
    ),
}
_LONGEST = timedelta(days=1)  # the first process may write a report for as long
_is_split = False


def count() -> int:
    """Return the number of processes of this run."""
    started = all(name in os.environ for name in _SET_BY_LAUNCHERS)
    return int(os.environ["WORLD_SIZE"]) if started else 1


def index() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def local_index() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if count() > 1 else 0


@contextmanager
def joined() -> Iterator[None]:
    """Connect the processes of this run inside the context, and split its models if asked to.

    Raises:
        ValueError: the launcher is told to split the model in a way that a run does not know.
    """
    for name, (what, remedy) in _REFUSED.items():
        if (_is_on(_FSDP) or not name.startswith("FSDP_")) and _is_on(name):
            raise ValueError(f"The launcher is told to use {what}, which a run does not: {remedy}.")
    global _is_split
    split = _is_on(_FSDP)
    if split and (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"The launcher is told to use FSDP with fsdp_version: {version}, which a run does not: "
            "set fsdp_version: 2 in its configuration."
        )
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST)
    _is_split = split and count() > 1
    try:
        # Models are split when they are loaded; Trainer would split them again.
        os.environ |= {_FSDP: "false"} if split else {}
        yield
    finally:
        os.environ |= {_FSDP: "true"} if split else {}
        _is_split = False


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


def is_split() -> bool:
    """Say whether each process has a part of a model, so that all of them run it together."""
    return _is_split


class FirstFailed(RuntimeError):
    """Raised in the other processes for an error of the first, which tells it."""


def from_first(make: Callable[[], _Found]) -> _Found:
    """Return in all processes what `make` returns in the first; the others wait for it.

    Raises:
        FirstFailed: in the others, where `make` raises in the first. Nobody waits for it then.
    """
    if count() == 1:
        return make()
    import torch.distributed as dist

    found: list[Any] = [None, None]
    error: BaseException | None = None
    if index() == 0:
        try:
            found[0] = make()
        except BaseException as raised:
            error, found[1] = raised, f"The first process failed: {raised}"
    dist.broadcast_object_list(found, src=0)
    if error is not None:
        raise error
    if found[1] is not None:
        raise FirstFailed(found[1])
    result: _Found = found[0]
    return result


def in_all(make: Callable[[], _Found]) -> _Found:
    """Return what `make` returns in this process; an error in the first is told by it alone."""
    made: list[_Found] = []
    failed: list[Exception] = []
    try:
        made.append(make())
    except Exception as error:
        failed.append(error)

    def tell() -> None:
        if failed:
            raise failed[0]

    from_first(tell)
    tell()
    return made[0]


def wait() -> None:
    """Wait until all processes are here."""
    together({})


def together(own: dict[int, _Found]) -> dict[int, _Found]:
    """Return the parts of all processes, which each have made some of."""
    if count() == 1:
        return own
    import torch.distributed as dist

    parts: list[dict[int, _Found]] = [{} for _ in range(count())]
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def shares(total: int) -> list[int]:
    """Return the numbers of the parts that this process makes, out of `total`.

    They are equally many in each process, since a model that is split runs in all at once. So the
    last parts may be made twice.
    """
    rounds = -(-total // count())
    return [(i * count() + index()) % total for i in range(rounds)]
