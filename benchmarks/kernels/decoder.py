"""A decoder layer, or a whole model, with random weights, adapted by peft and by every provider.

All providers of a case share the storage of the frozen weights; adapters are each one's own.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size, D residual width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from benchmarks.kernels.peft_providers import in_dtype, lora_layers
from benchmarks.kernels.provider import (
    SCALING,
    Bases,
    Provider,
    closed,
    normal,
    orthonormal,
    trained,
)
from benchmarks.kernels.shapes import LINEARS, WRITERS, Decoder

# Size of B: with an update as large as the frozen product the softmax saturates, and the gradients
# of its arguments are rounding (27 % of error in bfloat16, whoever computes them).
_LORA_B = 0.25

Adapters = dict[str, tuple[Tensor, Tensor]]  # name of a linear -> A[R, K], B[N, R]


class Hidden(nn.Module):
    """One decoder layer with its rotary embedding and mask: `x[1, T, D]` to `y[1, T, D]`."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind the layer."""
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


class Loss(nn.Module):
    """A language model: `tokens[1, T]` to its next-token loss."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """A scalar."""
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


class StepWork:
    """A training step: the loss, then its gradients and AdamW."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.parameters = trained(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4) if self.parameters else None

    def reset(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def forward(self) -> Tensor:
        return self.model(self.tokens)

    def backward(self, y: Tensor) -> None:
        y.backward()
        if self.optimizer is not None:
            self.optimizer.step()


@dataclass(frozen=True)
class Adapted:
    """A frozen module with the adapters and the basis of a case."""

    module: nn.Module
    adapters: Adapters
    basis: Tensor | None  # V[D, Q], float32, shared by all writers
    width: int

    def build(self, provider: Provider) -> nn.Module:
        """The module on the layers of a provider."""
        return self._with_layers_of(provider, self._copy())

    def build_for_training(self, provider: Provider, checkpointing: bool) -> nn.Module:
        """The same for a model; its embeddings want a gradient, as they do under checkpointing."""
        module = self._copy()
        model: Any = module.model
        model.enable_input_require_grads()
        if checkpointing:
            # transformers 5 renames it on its way
            older = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
        return self._with_layers_of(provider, module).train()

    def _copy(self) -> nn.Module:
        shared: dict[int, Any] = {id(p): p for p in self.module.parameters()}
        return copy.deepcopy(self.module, shared)

    def _with_layers_of(self, provider: Provider, module: nn.Module) -> nn.Module:
        if provider.adapt is None or provider.adapters == "none":
            return module
        R = next(iter(self.adapters.values()))[0].shape[0]
        config = LoraConfig(r=R, lora_alpha=SCALING * R, target_modules=list(LINEARS))
        adapted = get_peft_model(module, config, autocast_adapter_dtype=False)
        for name, layer in lora_layers(adapted).items():
            for factors, value in zip(
                (layer.lora_A, layer.lora_B), self.adapters[name], strict=True
            ):
                factors["default"].weight = nn.Parameter(in_dtype(value, provider.adapters))
        return provider.adapt(adapted, self._bases())

    def double(self) -> Adapted:
        """The same in float64, with storage of its own."""
        adapters = {name: (A.double(), B.double()) for name, (A, B) in self.adapters.items()}
        return replace(self, module=copy.deepcopy(self.module).double(), adapters=adapters)

    def inputs(self, T: int, seed: int) -> tuple[Tensor, Tensor]:
        """`x[1, T, D]` and `dy[1, T, D]` for a decoder layer."""
        shape = 1, T, self.width
        return normal(next(self.module.parameters()), seed, shape, shape)

    def _bases(self) -> Bases:
        if self.basis is None:
            return {}
        return {name: self.basis for name in self.adapters if _last(name) in WRITERS}


def decoder_layer(decoder: Decoder, dtype: torch.dtype, device: str, R: int, Q: int) -> Adapted:
    """One layer without the norm behind the last one."""
    model = _new(LlamaModel, _config(decoder._replace(vocabulary=8), 1), dtype, device)
    model.norm = nn.Identity()
    return _adapted(Hidden(model), decoder, R, Q)


def whole_model(
    decoder: Decoder, layers: int, dtype: torch.dtype, device: str, R: int, Q: int
) -> Adapted:
    """Embedding, `layers` decoder layers, norm, head and loss."""
    model = _new(LlamaForCausalLM, _config(decoder, layers), dtype, device)
    return _adapted(Loss(model), decoder, R, Q)


def one_layer_model(decoder: Decoder, dtype: torch.dtype) -> LlamaForCausalLM:
    """A language model of one decoder layer, with the weights of its class."""
    model: LlamaForCausalLM = _new(LlamaForCausalLM, _config(decoder, 1), dtype, "cpu")
    return model


def _new(kind: Any, config: LlamaConfig, dtype: torch.dtype, device: str) -> Any:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # or the weights would stand in memory in float32 first
    try:
        with torch.device(device):
            return kind(config)
    finally:
        torch.set_default_dtype(previous)


def _config(decoder: Decoder, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.key_value_heads,
        head_dim=decoder.head_size,
        num_hidden_layers=layers,
        vocab_size=decoder.vocabulary,
        max_position_embeddings=1 << 17,
        attn_implementation="sdpa",
    )


@torch.no_grad()
def _adapted(module: nn.Module, decoder: Decoder, R: int, Q: int) -> Adapted:
    module.requires_grad_(False)
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() == 2:  # every term of a result of about the same size
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    basis = None
    if Q:
        basis = orthonormal(decoder.hidden, Q, torch.Generator().manual_seed(0)).to(device)
    adapters: Adapters = {}
    for name, linear in module.named_modules():
        if _last(name) not in LINEARS or not isinstance(linear, nn.Linear):
            continue
        N, K = linear.weight.shape
        A, B = (
            tensor.normal_(std=size * tensor.shape[1] ** -0.5, generator=generator)
            for size, tensor in (
                (1.0, linear.weight.new_empty(R, K)),
                (_LORA_B, linear.weight.new_empty(N, R)),
            )
        )
        adapters[name] = A, closed(B, basis if _last(name) in WRITERS else None)
    return Adapted(module, adapters, basis, decoder.hidden)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def step_memory(
    decoder: Decoder,
    layers: int,
    T: int,
    R: int,
    bytes_per_value: int,
    checkpointing: bool,
    providers: int,
) -> int:
    """Bytes that the steps of some providers, in turn, are estimated to take at their peak.

    Frozen weights, each one's adapter with float32 gradients and Adam states, what a layer saves of
    its activations (all layers, or one and the inputs of all), logits with their float32 copies.
    """
    e = bytes_per_value
    weights = sum(linear.K * linear.N for linear in decoder.linears)
    adapter = sum(R * (linear.K + linear.N) for linear in decoder.linears)
    inside = T * sum(linear.K + linear.N for linear in decoder.linears) * e
    stream = T * decoder.hidden * (e + 4)  # a norm works in float32
    saved = layers * T * decoder.hidden * e + inside if checkpointing else layers * inside
    return int(
        layers * (weights * e + providers * adapter * (e + 16))
        + 2 * decoder.vocabulary * decoder.hidden * e
        + saved
        + (1 if checkpointing else layers) * 2 * stream
        + T * decoder.vocabulary * (e + 8)
    )
