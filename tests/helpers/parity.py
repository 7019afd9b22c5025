"""Trainings of stock peft, of GraspLoRALinear and in float64 from the same start, held together."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config

import grasp_kernels as gk
from grasp_kernels.ops.lora_linear.dropout import dropout, host_seed
from tests.helpers.models import ALL_LINEAR, SIZES, randomise_adapter, tiny_model
from tests.helpers.oracle import RATIO

STEPS = 20
WRITERS = ("o_proj", "down_proj")
SOME = ("q_proj", *WRITERS)
EPS = torch.finfo(torch.float32).eps


class SameMask(nn.Module):
    """Dropout as torch does it, of the elements that the operator's own dropout drops."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rows = x.reshape(-1, x.shape[-1])
        mask = dropout(torch.ones_like(rows), host_seed(rows), self.p).view(x.shape) != 0
        return x * mask / (1.0 - self.p)


def lora_model(base: dict[str, Any] | None = None, **options: Any) -> PeftModel:
    """A tiny Qwen2 of two blocks (its q, k and v have biases) whose adapter looks trained."""
    # r = 16: see test_without_a_subspace_it_is_stock_peft
    config = {"r": 16, "lora_alpha": 16, "target_modules": list(ALL_LINEAR), **options}
    model = get_peft_model(qwen(**(base or {})), LoraConfig(**config))
    if "init_lora_weights" not in options:
        randomise_adapter(model)
    return model


def qwen(**options: Any) -> PreTrainedModel:
    model = tiny_model(Qwen2Config, **options)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def with_same_masks(model: nn.Module) -> nn.Module:
    """A stock model that drops what the operator would drop."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = SameMask(dropout.p)
    return model


@dataclass
class Trace:
    """Of a training: the loss and all gradients of every step, and the scales of a GradScaler."""

    losses: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


def batches(count: int, lengths: int = 4) -> Iterator[Tensor]:
    """Token ids `[2, T]` of four batches, again and again, each of its own length if 4."""
    for i in range(count):
        generator = torch.Generator().manual_seed(i % 4)
        yield torch.randint(0, SIZES["vocab_size"], (2, 5 + i % lengths), generator=generator)


def train(
    model: nn.Module,
    *,
    steps: int = STEPS,
    parts: int = 1,
    lengths: int = 4,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    between: Callable[[nn.Module], Any] | None = None,
) -> Trace:
    """Train with SGD, slowly: AdamW makes a full step of a gradient that is all rounding, and at
    0.01 two trainings in bfloat16 were 75 % apart in their gradients after 20 steps (5 % at 0.002).

    Args:
        parts: backward passes that are accumulated to one step.
        between: called between every forward and its backward.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.002, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    trace = Trace()
    torch.manual_seed(3)
    data = batches(steps * parts, lengths)
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(parts):
            ids = next(data)
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                loss = model(input_ids=ids, labels=ids).loss / parts
            if between is not None:
                between(model)
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        gradients = [p.grad.double().flatten() for p in trained if p.grad is not None]
        trace.losses.append(total)
        trace.gradients.append(torch.cat(gradients))
        trace.scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    return trace


def errors(found: Trace, oracle: Trace) -> tuple[list[float], float]:
    """Relative error of every step's gradients, and the norm of the errors of all losses."""
    steps = zip(found.gradients, oracle.gradients, strict=True)
    losses = torch.tensor(found.losses) - torch.tensor(oracle.losses, dtype=torch.float64)
    return [float((g - exact).norm() / exact.norm()) for g, exact in steps], float(losses.norm())


def assert_parity(found: Trace, stock: Trace, oracle: Trace, eps: float = EPS) -> None:
    """The training learned something, and ours is as near to the oracle as stock peft is."""
    assert sum(oracle.losses[-4:]) < sum(oracle.losses[:4])
    (ours, our_loss), (theirs, their_loss) = errors(found, oracle), errors(stock, oracle)
    assert median(a / b for a, b in zip(ours, theirs, strict=True)) <= RATIO
    unit = eps * float(torch.tensor(oracle.losses).norm())  # one in the last place of every loss
    assert our_loss <= RATIO * max(their_loss, unit)


def check_parity(make: Callable[[], nn.Module], eps: float = EPS, **options: Any) -> None:
    """Train three copies: on GraspLoRALinear, on stock layers, and on those in float64."""
    ours = make()
    report = gk.apply_grasp(ours)
    assert not report.fallbacks
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA layers run peft's own forward")
        found = train(ours, **options)
    stock = train(with_same_masks(make()), **options)
    exact = {**options, "autocast": None, "scaler": None}
    assert_parity(found, stock, train(with_same_masks(make()).double(), **exact), eps)


def two_adapters() -> PeftModel:
    """`default` on the writers and q, `other` on q and v with another rank."""
    model = lora_model(target_modules=list(SOME))
    other = LoraConfig(r=12, lora_alpha=12, target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", other)
    randomise_adapter(model)
    return model
