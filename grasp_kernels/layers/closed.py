"""The common base of closed layers: all factors that leave a layer are out of the subspace.

The parameters are projected after each step of a torch optimizer. So the trained parameters are the
saved ones, and saving or measuring changes nothing. Nothing relies on this. Updates unknown to
torch (DeepSpeed, raw writes, averages that are swapped in) leave parameters that are not closed;
forward, state dict and merge then work with closed copies. The same holds for the flat slices of
FSDP1: no process can project a slice by itself. The shards of FSDP2 are gathered and projected
after the step, by all processes together.

Shapes: E experts, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import hotswap
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from grasp_kernels.models.sharding import is_away, is_sharded, like, refuse_away, whole
from grasp_kernels.ops.autocast import without_autocast
from grasp_kernels.ops.projection import project_columns

# Mixed into a layer class of peft with undeclared attributes. With LoraLayer as its base, Python
# would refuse to swap the class of an instance.
_LAYER: Any = nn.Module
# The share of a basis that float32 leaves in a closed factor; the rounding of a narrower dtype
# comes on top.
_CLOSED_TO = 8 * torch.finfo(torch.float32).eps


class ClosedLayer(_LAYER):
    """Keep a LoRA layer of peft closed: `class Ours(ClosedLayer, TheirLayer)`, in this order.

    Closed layers keep `Vᵀ ΔW = 0` in their forward, state dict and merged weights.

    An adapter that is added later, or gets weights that are loaded or swapped in, is examined in
    its first forward. The adapter is closed if closing changes nothing: B is zero, as in a fresh
    adapter, or its factors are closed already, as in a checkpoint of this training. Otherwise the
    adapter computes as in peft, with a warning, until `apply_grasp` is called again.

    Attributes:
        stock: the class of peft that a layer becomes again when it is released.
        write_basis: `V[N, Q]`, float32, or None. Not a buffer: FSDP rounds buffers in mixed
            precision, and DDP sends buffers around in every forward.
        closes: whether later adapters are closed if closing changes nothing.
        closed_adapters: names of the closed adapters.
        new_adapters: names of the adapters not examined yet.
        told: the warnings given so far, in this layer or another layer of the model.
    """

    stock: type
    write_basis: Tensor | None
    closes: bool = False
    closed_adapters: frozenset[str] = frozenset()
    new_adapters: frozenset[str] = frozenset()
    told: set[str]
    # Attributes that are not those of peft's own class.
    _foreign: tuple[str, ...] = ("write_basis", "closes", "closed_adapters", "new_adapters", "told")

    def __init_subclass__(cls, **options: Any) -> None:
        """Carry the name of peft's class, since peft reads it; `__qualname__` stays ours."""
        super().__init_subclass__(**options)
        if "stock" in cls.__dict__:
            cls.__name__ = cls.stock.__name__

    def _get_name(self) -> str:
        return type(self).__qualname__  # the name in a printed model

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as peft does; a later adapter of this name is new."""
        super().delete_adapter(adapter_name)
        self.closed_adapters -= {adapter_name}
        self.new_adapters -= {adapter_name}

    def set_basis(
        self, basis: Tensor | None, closed: bool, weight: Tensor, told: set[str] | None = None
    ) -> None:
        """Set the basis on the device of `weight`; the present adapters are closed if `closed`.

        `told` is shared by the layers of a model, so that a model with hundreds of them warns once.
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
        _layers.add(self)  # a copy has its own

    def move_basis(self, device: torch.device) -> None:
        """Move the basis to the device of the weights; FSDP may move the weights unannounced."""
        basis = self.write_basis
        # A weight that is loaded later has no data yet; a basis moved there would lose its data.
        if basis is not None and basis.device != device and device.type != "meta":
            self.write_basis = basis.to(device)

    @classmethod
    def adopt(cls, layer: LoraLayer, *projection: Any) -> None:
        """Turn a stock layer into this class in place; arguments as for `set_projection`."""
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.set_projection(*projection)

    def release(self) -> None:
        """Turn this layer back into peft's own in place, with the weights of its forward."""
        self.close_()  # or raises, and nothing has changed
        _layers.discard(self)
        for name in self._foreign:
            self.__dict__.pop(name, None)
        self.__class__ = self.stock

    def close_(self) -> None:
        """Write `B°`, `b°` into the parameters; the function of the layer stays unchanged.

        All processes must call this method where the parameters are DTensors.

        Raises:
            ValueError: FSDP or DeepSpeed has left a slice of a factor here.
        """
        _close_(list(self.kept_closed()))

    def kept_closed(self, here: bool = False) -> Iterator[_Factor]:
        """Yield the writing factors of closed adapters, if there is a basis.

        Raises:
            ValueError: a factor is not here; with `here` such factors are left out.
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
        """Replace B, b by `B°`, `b°` in the modules inside the context; gradients reach B, b.

        DTensors are closed in place instead: a process holds only a part of them.

        Args:
            as_saved: take the factors of the state dict, to the bit and without a gradient.
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
        """Decide whether later adapters in use are closed."""
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
                    f"The adapter {name!r} was added to layers that are kept out of a subspace, "
                    f"but {along:.1%} of one of its factors lies along it, so the adapter computes "
                    "the same as in peft and is not closed: call apply_grasp again to close it.",
                )

    def _tell(self, what: str, sentence: str) -> None:
        """Warn once for each model."""
        if what not in self.told:
            self.told.add(what)
            warnings.warn(sentence, stacklevel=2)

    def look_again(self, name: str) -> None:
        """Mark an adapter with foreign weights as new."""
        if self.closes and name in self.lora_A:
            self.closed_adapters -= {name}
            self.new_adapters |= {name}
            self.told.discard(name)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as peft does, with the others closed: peft may combine them in it."""
        self.close_()
        super().update_layer(adapter_name, *args, **kwargs)
        self.look_again(adapter_name)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as peft does, with the closed factors."""
        with self.computing_closed(as_saved=True):
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """Unmerge as peft does, with the closed factors."""
        with self.computing_closed(as_saved=True):
            super().unmerge()

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """Return peft's `ΔW[N, K]` of the closed factors."""
        with self.computing_closed(as_saved=True):
            return super().get_delta_weight(adapter, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return torch's state dict with closed factors: the parameters themselves, as a rule.

        All processes must call this method where the parameters are DTensors.
        """
        found = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        factors = list(self.kept_closed(here=True))  # FSDP1 calls this with slices too
        for factor, value in zip(factors, closed(factors), strict=True):
            if value is not factor.weight and prefix + factor.key in found:
                found[prefix + factor.key] = like(factor.weight, value)
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.lora_A:
            if f"{prefix}lora_B.{name}.weight" in state_dict:
                self.look_again(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClosedLayer:
        # A basis follows to another device but keeps its dtype: closure is as exact as the basis.
        super()._apply(fn, recurse)
        self.move_basis(next(self.parameters()).device)
        return self


class GraspLoRAExperts(ClosedLayer, ParamWrapper):
    """Keep the factor `B[N, R E]` of a `ParamWrapper` of peft out of the basis.

    peft computes the forward. All experts write to the stream, so one basis serves them, and
    closing the stacked factors closes each expert. The gradient is projected where the sum over the
    experts enters the stream, not here.
    """

    stock = ParamWrapper

    def set_projection(self, basis: Tensor | None, closed: bool, told: set[str]) -> None:
        """Set the basis, see `set_basis`."""
        self.set_basis(basis, closed, self.get_param(), told)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run peft's forward with the closed factors."""
        if self.new_adapters and not torch.compiler.is_compiling():
            self.look_at_new()
        with self.computing_closed():
            return super().forward(x, *args, **kwargs)


class _Factor(NamedTuple):
    """Hold a parameter of an adapter, B `[N, R]` or b `[N]`, and its basis `V[N, Q]`."""

    key: str  # in the state dict of the layer
    module: nn.Module
    name: str
    basis: Tensor

    @property
    def place(self) -> dict[str, Any]:
        """Return the dictionary with the factor; a view gathered by FSDP1 hides the parameter."""
        own = self.module.__dict__
        return own if self.name in own else self.module._parameters

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.place[self.name]
        return weight

    def projected(self) -> Tensor:
        """Return the closed factor; gradients through this factor are projected."""
        weight = self.weight
        return project_columns(weight, self.basis.to(weight.device)).to(weight.dtype)

    def along(self, weight: Tensor) -> Tensor:
        """Return `Vᵀ M [Q, ...]` for `M` in the shape of this factor, at least in float32."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return without_autocast(torch.matmul, self.basis.to(wide).mT, wide)

    def without(self, along: Tensor, weight: Tensor) -> Tensor:
        """Return `M − V Vᵀ M` for `M` in the shape of this factor and `Vᵀ M`, rounded once.

        The result is laid out as the parameter: a product may round another layout differently.
        """
        removed = without_autocast(torch.matmul, self.basis.to(along), along)
        return (weight.to(along.dtype) - removed).to(weight.dtype).contiguous()

    def share(self) -> float:
        """Return the share of the factor along the basis, 0 to 1; 0 where rounding explains it."""
        weight = whole(self.weight)
        size = float(torch.linalg.vector_norm(weight.float()))
        along = float(torch.linalg.vector_norm(self.along(weight)))
        explained = max(_CLOSED_TO, torch.finfo(weight.dtype).eps / 2) * size
        return 0.0 if along <= explained else along / size


@torch.no_grad()
def closed(factors: Sequence[_Factor]) -> list[Tensor]:
    """Return every whole factor, closed up to its dtype; a closed parameter itself.

    A factor is projected in float32 and rounded, again for as long as this halves its remaining
    share along the basis. So closing a closed factor changes no bit of it, in any dtype, and the
    remaining share is its rounding. All factors take their turns together: the host waits for a
    device once a turn, and two turns are normal.
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
    """Read all norms off the device together."""
    norms = torch._foreach_norm(list(matrices.values())) if matrices else ()
    read = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else ()
    return dict(zip(matrices, read, strict=True))


def _close_(factors: Sequence[_Factor]) -> None:
    for factor, value in zip(factors, closed(factors), strict=True):
        if value is not factor.weight:
            # Past autograd's version counter: a pending backward has saved B°, and a reference
            # model between forward and backward must not invalidate B°.
            factor.weight.data.copy_(like(factor.weight, value))


def unpickled(make: Callable[[type], Any], stock: type) -> Any:
    """Return an empty object of a class that `make` makes, which no pickle finds."""
    return make(stock).__new__(make(stock))


# --- events that the layers learn of

_layers: WeakSet[ClosedLayer] = WeakSet()


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the parameters in one order in all processes, since all close DTensors together."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    """Examine new adapters: compiled code does not, and after the step they look trained."""
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
    """Swap weights in as peft does, and mark the adapter as new in its layers."""
    _swap(model, state_dict, adapter_name, *args, **kwargs)
    for module in model.modules():
        if isinstance(module, ClosedLayer):
            module.look_again(adapter_name)


hotswap.hotswap_adapter_from_state_dict = _swap_and_look_again
