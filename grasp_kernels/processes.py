"""The processes of one run, which `torchrun` or `accelerate launch` has started.

Each has the whole model and a part of every batch. The first process writes all files; the others
wait for it, and then read what it wrote.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

_Found = TypeVar("_Found")
_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
# Environment variables of `accelerate launch` with ways to split a model.
_SPLIT = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
_LONGEST = timedelta(days=1)  # the first process may write a report for as long


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
    """Connect the processes of this run inside the context.

    Raises:
        ValueError: the launcher is told to split the model over processes.
    """
    if count() > 1:
        if asked := [name for name in _SPLIT if os.environ.get(name, "").lower() == "true"]:
            raise ValueError(
                f"The launcher is told to split the model ({asked[0]}), but a run keeps a whole "
                "model in each process: launch it with --multi_gpu, or train with GraspTrainer."
            )
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST)
    yield


def from_first(make: Callable[[], _Found]) -> _Found:
    """Return in all processes what `make` returns in the first; the others wait for it."""
    if count() == 1:
        return make()
    import torch.distributed as dist

    found: list[Any] = [make() if index() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    result: _Found = found[0]
    return result


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


def is_ours(number: int) -> bool:
    """Say whether this process makes the part of a number."""
    return number % count() == index()
