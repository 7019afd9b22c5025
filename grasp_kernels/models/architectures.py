"""The places where a module touches the residual stream of a decoder.

A *writer* adds its output to the stream (`o_proj`, `down_proj`). There may be a norm between a
writer and the stream, as in Gemma and OLMo. Names are those of the base model:
"model.layers.0.self_attn.o_proj".

An RMS norm divides by a scale of each token, and apart from that it is linear, `M = diag(γ)`. So a
move of the writer along `y` moves the stream along `M y`. A writer moves nothing along `v` if and
only if its output has nothing along `Mᵀ v = M v`.

Shapes: `D` width of the stream, `k` directions.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from torch import Tensor, nn

from grasp_kernels.models.names import base_name, expert_part
from grasp_kernels.models.sharding import whole

NORMS = ("rms", "rms1p")  # γ is the weight; γ is 1 + weight


@dataclass(frozen=True)
class Site:
    """Name one writer to the stream, a module or a parameter of fused experts.

    `norm` is the module name of the norm after a writer. Without a norm it is None: the output of
    such a writer is in the stream, and its gradient is projected there.
    """

    name: str
    norm: str | None
    norm_kind: str = "rms"

    def gain(self, weight: Tensor) -> Tensor:
        """Return `γ[D]` from the weight of the norm."""
        return 1.0 + weight.float() if self.norm_kind == "rms1p" else weight

    def scaled(self, directions: Tensor, gain: Tensor | None) -> Tensor:
        """Return `M v` for `v[D, k]`, the move of the stream by a move of the site's output.

        It is also the direction at the output that moves the stream along `v`.
        """
        if self.norm is None or gain is None:
            return directions
        return gain.to(directions)[:, None] * directions


@dataclass(frozen=True)
class SiteRules:
    """Hold the names of the writers of one architecture inside a decoder block.

    Not every block needs to have all of them: dense and sparse blocks may alternate.

    Args:
        writers: names below a block, such as ("self_attn.o_proj", "mlp.down_proj"), or a mapping
            from each name to that of the norm after it, or None.
        blocks: name of the ModuleList of decoder blocks; a module is
            "<anything>.<blocks>.<i>.<rest>".
        outputs: modules below a block that are not writers, but with an output added to the stream,
            such as a mixture of experts. Their gradient is projected, and with it the gradient of
            everything inside. The norms after writers count as such modules without being named.
        norms: the kind of the norms after writers, "rms", or "rms1p" with the gain 1 + weight.

    Raises:
        TypeError, ValueError: not of this form.
    """

    writers: Mapping[str, str | None] | tuple[str, ...]
    blocks: str = "layers"
    outputs: tuple[str, ...] = ()
    norms: str = "rms"

    def __post_init__(self) -> None:
        if isinstance(self.writers, str) or isinstance(self.outputs, (str, Mapping)):
            raise TypeError(
                f"SiteRules got writers={self.writers!r} and outputs={self.outputs!r}; give each "
                "as a tuple of names (with norms: a dictionary from a writer to its norm)."
            )
        if self.norms not in NORMS:
            raise ValueError(f"SiteRules got norms={self.norms!r}; use one of {NORMS}.")

    @cached_property
    def _norms(self) -> dict[str, str | None]:
        """Return the norm after each writer and output."""
        writers = self.writers if isinstance(self.writers, Mapping) else dict.fromkeys(self.writers)
        return {**writers, **dict.fromkeys([*self.outputs, *filter(None, writers.values())])}

    def split(self, name: str) -> tuple[str, int, str] | None:
        """Return stem, layer and rest, ("model.layers", 3, "mlp.up_proj"); None elsewhere."""
        match = re.match(rf"((?:.+?\.)?{re.escape(self.blocks)})\.(\d{{1,6}})\.(.+)$", name)
        return (match[1], int(match[2]), match[3]) if match else None

    def site(self, name: str) -> Site | None:
        """Return the site called `name` in the base model, or None if it is not a writer.

        A module of one expert is part of the site of all experts.
        """
        parts = self.split(name)
        part = expert_part(name) if parts and parts[2] not in self._norms else None
        if part is not None:
            name, parts = part.whole, self.split(part.whole)
        if parts is None or parts[2] not in self._norms:
            return None
        stem, layer, rest = parts
        norm = self._norms[rest]
        return Site(name, f"{stem}.{layer}.{norm}" if norm else None, self.norms)


_LLAMA = SiteRules(writers=("self_attn.o_proj", "mlp.down_proj"))
_LINEARS_OF_LLAMA = {
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
}
_OLMO2 = SiteRules(
    writers={
        "self_attn.o_proj": "post_attention_layernorm",
        "mlp.down_proj": "post_feedforward_layernorm",
    }
)
_GEMMA2 = replace(_OLMO2, norms="rms1p")
# The weights of all experts are one parameter. A block may be dense instead, as in Llama; the
# shared expert is Qwen2's.
_MIXTURE = SiteRules(
    writers=(*_LLAMA.writers, "mlp.experts.down_proj", "mlp.shared_expert.down_proj"),
    outputs=("mlp",),
)

RULES: dict[str, SiteRules] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), _LLAMA),
    "gemma": replace(_LLAMA, norms="rms1p"),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gemma3": replace(_GEMMA2, blocks="language_model.layers"),  # next to a tower for images
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO2),
    "gpt2": SiteRules(writers=("attn.c_proj", "mlp.c_proj"), blocks="h"),
    "gpt_neox": SiteRules(writers=("attention.dense", "mlp.dense_4h_to_h")),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MIXTURE),
}


def site_rules(
    model_type: str | None, module_names: Iterable[str], sites: SiteRules | None = None
) -> SiteRules:
    """Return the rules for a model.

    Args:
        model_type: `config.model_type` of the base model, None if unknown.
        module_names: base names of the linear layers at hand; they decide where the type is
            unknown, and are quoted in the error.
        sites: rules of the caller, which win over everything.

    Raises:
        ValueError: neither the type nor the names belong to a known architecture.
    """
    if sites is not None:
        return sites
    seen = list(module_names)
    if model_type in RULES:
        # peft may only know the folder of a model in transformers, and a family's models for text
        # and for images share this folder.
        text = RULES.get(f"{model_type}_text")
        both = (RULES[model_type], text or RULES[model_type])
        fitting = (rules for rules in both if any(rules.split(name) for name in seen))
        return next(fitting, RULES[model_type])
    inside = [match for name in seen if (match := re.match(r"(.*?)\.\d+\.(.+)", name))]
    parts = [_LLAMA.split(match[0]) for match in inside]
    if model_type is None and parts and all(p and p[2] in _LINEARS_OF_LLAMA for p in parts):
        return _LLAMA
    endings = sorted({match[2] for match in inside} or set(seen))
    blocks = sorted({match[1].rpartition(".")[2] for match in inside})
    raise ValueError(
        f"The modules that write to the residual stream of model type {model_type!r} (modules "
        f"{endings[:8]} in blocks {blocks}) are not known; give a model of a known type "
        f"({', '.join(sorted(RULES))}); in Python, declare them with "
        'sites=SiteRules(writers=("attn.out",), blocks="layers") of '
        "grasp_kernels.models.architectures."
    )


def model_sites(model: nn.Module, sites: SiteRules | None = None) -> tuple[Site, ...]:
    """Return every writer of a model, plain or wrapped by peft, in the order of its modules."""
    # Layers of peft and of quantisation libraries are not nn.Linear, but all have a width.
    linears = (base_name(n) for n, m in model.named_modules() if written_width(m) is not None)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    rules = site_rules(model_type, linears, sites)
    names = (base_name(n) for n, _ in chain(model.named_modules(), model.named_parameters()))
    found = (rules.site(name) for name in dict.fromkeys(names))
    return tuple(site for site in found if site is not None)


def model_gains(model: nn.Module, sites: Iterable[Site]) -> dict[str, Tensor]:
    """Return the gain `γ[D]` of each norm after `sites`, by the norm's module name."""
    modules = {base_name(name): module for name, module in model.named_modules()}
    gains: dict[str, Tensor] = {}
    for site in sites:
        weight = getattr(modules.get(site.norm or ""), "weight", None)
        if site.norm is not None and site.norm not in gains and weight is not None:
            gains[site.norm] = site.gain(whole(weight))
    return gains


def written_width(module: nn.Module) -> int | None:
    """Return the output width of a linear layer; None for other modules."""
    width = getattr(module, "out_features", None)
    return getattr(module, "nf", None) if width is None else width
