"""What every closed layer does: its factors are out of the subspace in whatever leaves it.

The parameters are kept closed: after each step of a torch optimizer they are projected, so what is
trained is what is saved, and saving or measuring has nothing to change. Nothing relies on it. An
optimizer that torch does not know of (DeepSpeed, raw writes, averages that are swapped in) leaves
parameters that are not closed, and forward, state dict and merge work with closed ones of their
own. So it is with the flat slices of FSDP1, which no process can project by itself; the shards of
FSDP2 are gathered and projected after the step, by all processes together.

Shapes: K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from peft.utils import hotswap
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from grasp_kernels.models.sharding import (
    is_away,
    is_sharded,
    like,
    refuse_away,
    whole,
    write_whole_,
)
from grasp_kernels.ops.autocast import without_autocast
from grasp_kernels.ops.projection import project_columns

# Beside a layer class of peft, whose attributes are not declared; with LoraLayer as its base Python
# would refuse to swap the class of an instance.
_LAYER: Any = nn.Module
# What float32 leaves of a basis in a factor that is closed; of what is stored in less, its rounding
# comes on top.
_CLOSED_TO = 8 * torch.finfo(torch.float32).eps


class ClosedLayer(_LAYER):
    """Mixed into a LoRA layer of peft, before it: `class Ours(ClosedLayer, TheirLayer)`.

    Closed layers keep `Vᵀ ΔW = 0` in whatever leaves them: forward, state dict, merged weights.

    What comes in later, an adapter that is added, or weights that are loaded or swapped in, is
    looked at in its first forward. It is closed if that changes nothing: B is zero, as in a fresh
    one, or its factors are closed already, as in a checkpoint of this training. Else it computes
    what peft computes, which a warning says, until `apply_grasp` is called again.

    Attributes:
        stock: the class of peft that a layer becomes again when it is released.
        write_basis: `V[N, Q]`, float32, or None. Not a buffer: those are rounded by FSDP in mixed
            precision, and sent around by DDP in every forward.
        closes: whether adapters that come later are closed if that changes nothing.
        closed_adapters: names of the adapters that are kept closed.
        new_adapters: names of those that were not looked at yet.
        told: what a warning has told of, in this layer or another one of the model.
    """

    stock: type
    write_basis: Tensor | None
    closes: bool = False
    closed_adapters: frozenset[str] = frozenset()
    new_adapters: frozenset[str] = frozenset()
    told: set[str]

    def __init_subclass__(cls, **options: Any) -> None:
        """Carry the name of peft's class, which peft asks layers for; `__qualname__` stays ours."""
        super().__init_subclass__(**options)
        if "stock" in cls.__dict__:
            cls.__name__ = cls.stock.__name__

    def _get_name(self) -> str:
        return type(self).__qualname__  # what printing a model shows

    def delete_adapter(self, adapter_name: str) -> None:
        """peft's; nothing is known of another adapter of that name."""
        super().delete_adapter(adapter_name)
        self.closed_adapters -= {adapter_name}
        self.new_adapters -= {adapter_name}

    def set_basis(
        self,
        basis: Tensor | None,
        closed: bool,
        weight: Tensor,
        told: set[str] | None = None,
    ) -> None:
        """Set the basis where `weight` is; the adapters that exist now are closed if `closed`.

        `told` is shared by the layers of a model, so that one with hundreds of them warns once.
        """
        self.told = set() if told is None else told
        self.write_basis = None if basis is None else basis.detach().to(torch.float32)
        self.move_basis(weight.device)
        self.closes = closed and basis is not None
        self.closed_adapters = frozenset(self.lora_A) if closed else frozenset()
        self.new_adapters = frozenset()
        _layers.add(self)
        self.close_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _layers.add(self)  # a copy is one of its own

    def move_basis(self, device: torch.device) -> None:
        """To the device of the weights, which FSDP may move without a word."""
        basis = self.write_basis
        # A weight that is loaded later has no data yet, and a basis would lose its own.
        if basis is not None and basis.device != device and device.type != "meta":
            self.write_basis = basis.to(device)

    def release(self) -> None:
        """Turn this layer back into peft's own, in place, with the weights it computed with."""
        self.close_()  # or raises, and nothing has changed
        _layers.discard(self)
        self._forget()
        self.__class__ = self.stock

    def _forget(self) -> None:
        """Remove what peft's own class does not have."""
        for name in ("write_basis", "closes", "closed_adapters", "new_adapters", "told"):
            self.__dict__.pop(name, None)

    def close_(self) -> None:
        """Write `B°`, `b°` into the parameters; the function of the layer stays as it is.

        All processes must call it where the parameters are DTensors.

        Raises:
            ValueError: FSDP or DeepSpeed has left a slice of a factor here.
        """
        _close_(list(self.kept_closed()))

    def kept_closed(self, here: bool = False) -> Iterator[_Factor]:
        """What closed adapters write with, if there is a basis.

        Raises:
            ValueError: one is not here, and those that are `here` were not asked for.
        """
        for name in sorted(self.closed_adapters & self.lora_A.keys()):
            yield from self._factors(name, here)

    def _factors(self, name: str, here: bool = False) -> Iterator[_Factor]:
        lora_B, basis = self.lora_B[name], self.write_basis
        if basis is None or (here and is_away(lora_B.weight)):
            return
        refuse_away(f"lora_B of the adapter {name!r}", lora_B.weight)
        for parameter in ("weight", "bias"):
            if getattr(lora_B, parameter, None) is not None:
                yield _Factor(f"lora_B.{name}.{parameter}", lora_B, parameter, basis)

    @contextmanager
    def computing_closed(self, as_saved: bool = False) -> Iterator[None]:
        """Inside, `B°`, `b°` stand where the modules have B, b, and gradients reach these.

        DTensors, of which a process has not all, are closed in place instead.

        Args:
            as_saved: take those of the state dict, to the bit, which have no gradient.
        """
        factors = [factor for factor in self.kept_closed() if not factor.weight.is_meta]
        _close_([factor for factor in factors if is_sharded(factor.weight)])
        factors = [factor for factor in factors if not is_sharded(factor.weight)]
        before = [factor.weight for factor in factors]
        values = closed(factors) if as_saved else [factor.projected() for factor in factors]
        for factor, value in zip(factors, values, strict=True):
            factor.place[factor.name] = value
        try:
            yield
        finally:
            for factor, weight in zip(factors, before, strict=True):
                factor.place[factor.name] = weight

    @torch.no_grad()
    def look_at_new(self) -> None:
        """Decide for adapters in use that came later whether they are closed."""
        for name in sorted(self.new_adapters & set(self.active_adapters) & self.lora_A.keys()):
            factors = list(self._factors(name))
            if any(factor.weight.is_meta for factor in factors):
                continue
            self.new_adapters -= {name}
            trained = any(bool(whole(p).any()) for p in self.lora_B[name].parameters())
            along = max([0.0, *(factor.share() for factor in factors)]) if trained else 0.0
            if along == 0.0:
                self.closed_adapters |= {name}
            else:
                self._tell(
                    name,
                    f"The adapter {name!r} came into layers that are kept out of a subspace with "
                    f"{along:.1%} of a factor along it, so it computes what peft computes, and is "
                    "not closed: call apply_grasp again to close it.",
                )

    def _tell(self, what: str, sentence: str) -> None:
        """Warn once a model."""
        if what not in self.told:
            self.told.add(what)
            warnings.warn(sentence, stacklevel=2)

    def look_again(self, name: str) -> None:
        """Forget what is known of an adapter whose weights come from somewhere else."""
        if self.closes and name in self.lora_A:
            self.closed_adapters -= {name}
            self.new_adapters |= {name}
            self.told.discard(name)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """peft's, which adds an adapter, perhaps to combine the others in it: they are closed."""
        self.close_()
        super().update_layer(adapter_name, *args, **kwargs)
        self.look_again(adapter_name)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """peft's, of the closed factors."""
        with self.computing_closed(as_saved=True):
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """peft's, of the closed factors."""
        with self.computing_closed(as_saved=True):
            super().unmerge()

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """peft's `ΔW`, of the closed factors."""
        with self.computing_closed(as_saved=True):
            return super().get_delta_weight(adapter, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """torch's, with closed factors: the parameters themselves, as a rule.

        All processes must ask for it where the parameters are DTensors.
        """
        found = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        factors = list(self.kept_closed(here=True))  # FSDP1 asks those that have slices too
        for factor, value in zip(factors, closed(factors), strict=True):
            key = prefix + factor.key
            if value is not factor.weight and key in found:
                found[key] = like(factor.weight, value)
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.lora_A:
            if f"{prefix}lora_B.{name}.weight" in state_dict:
                self.look_again(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClosedLayer:
        # A basis only follows to another device: closure is as exact as it is.
        super()._apply(fn, recurse)
        self.move_basis(next(self.parameters()).device)
        return self


class _Factor(NamedTuple):
    """A parameter of an adapter, B `[N, R]` or b `[N]`, and the basis that it is kept out of."""

    key: str  # in the state dict of the layer
    module: nn.Module
    name: str
    basis: Tensor

    @property
    def place(self) -> dict[str, Any]:
        """Where the module has it; FSDP1 puts a view of what it gathered before the parameter."""
        own = self.module.__dict__
        return own if self.name in own else self.module._parameters

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.place[self.name]
        return weight

    def projected(self) -> Tensor:
        """The closed factor, through which gradients come projected."""
        weight = self.weight
        return project_columns(weight, self.basis.to(weight.device)).to(weight.dtype)

    def along(self, weight: Tensor) -> Tensor:
        """`Vᵀ M [Q, ...]` of a factor like this one, at least in float32."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return without_autocast(torch.matmul, self.basis.to(wide).mT, wide)

    def without(self, along: Tensor, weight: Tensor) -> Tensor:
        """`M − V Vᵀ M` of a factor like this one and its `Vᵀ M`, rounded once.

        Laid out as a parameter is: a product may round another layout otherwise.
        """
        removed = without_autocast(torch.matmul, self.basis.to(along), along)
        return (weight.to(along.dtype) - removed).to(weight.dtype).contiguous()

    def share(self) -> float:
        """What closing takes of the factor, 0 to 1; 0 where its rounding explains that."""
        weight = whole(self.weight)
        size = float(torch.linalg.vector_norm(weight.float()))
        along = float(torch.linalg.vector_norm(self.along(weight)))
        explained = max(_CLOSED_TO, torch.finfo(weight.dtype).eps / 2) * size
        return 0.0 if along <= explained else along / size


@torch.no_grad()
def closed(factors: Sequence[_Factor]) -> list[Tensor]:
    """Every factor, whole, out of its basis as far as its dtype allows; the parameter if it is so.

    A factor is projected in float32 and rounded, again for as long as this halves what is left
    along the basis. So closing a closed factor changes no bit of it, in any dtype, and what is left
    is its rounding. All take their turns together: a device is waited for once a turn, and two
    turns are normal.
    """
    found = [factor.weight for factor in factors]
    turn = [i for i, weight in enumerate(found) if not weight.is_meta]
    wholes = {i: whole(found[i]) for i in turn}
    along = {i: factors[i].along(wholes[i]) for i in turn}
    left = _norms(along)
    while turn:
        nearer = {i: factors[i].without(along[i], wholes[i]) for i in turn}
        along = {i: factors[i].along(nearer[i]) for i in turn}
        rest = _norms(along)
        turn = [i for i in turn if rest[i] < left[i] / 2]
        for i in turn:
            found[i] = wholes[i] = nearer[i]
            left[i] = rest[i]
    return found


def _norms(matrices: dict[int, Tensor]) -> dict[int, float]:
    """Read off the device together."""
    norms = torch._foreach_norm(list(matrices.values())) if matrices else ()
    read = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else ()
    return dict(zip(matrices, read, strict=True))


def _close_(factors: Sequence[_Factor]) -> None:
    for factor, value in zip(factors, closed(factors), strict=True):
        if value is not factor.weight:
            # Past autograd's version counter: a backward that is still to come has saved B°,
            # so a reference model between forward and backward does not invalidate it.
            write_whole_(factor.weight.data, value)


# --- what the layers are told of

_layers: WeakSet[ClosedLayer] = WeakSet()


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """In an order that is the same in all processes, which close DTensors together."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    """Compiled code does not look at new adapters, and after the step they look trained."""
    new = {
        id(parameter): layer
        for layer in _layers
        for name in layer.new_adapters & layer.lora_B.keys()
        for parameter in layer.lora_B[name].parameters()
    }
    for layer in [new[id(p)] for p in _parameters(optimizer) if id(p) in new] if new else ():
        layer.look_at_new()


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    kept = {id(f.weight): f for layer in _layers for f in layer.kept_closed(here=True)}
    if kept:
        _close_([kept[id(p)] for p in _parameters(optimizer) if id(p) in kept])


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)

_swap = hotswap.hotswap_adapter_from_state_dict


@functools.wraps(_swap)
def _swap_and_look_again(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """peft's, which writes into the parameters and lets no layer know."""
    _swap(model, state_dict, adapter_name, *args, **kwargs)
    for module in model.modules():
        if isinstance(module, ClosedLayer):
            module.look_again(adapter_name)


hotswap.hotswap_adapter_from_state_dict = _swap_and_look_again
