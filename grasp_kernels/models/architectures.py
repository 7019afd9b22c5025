"""Where a module touches the residual stream of a decoder.

A *writer* adds its output to the stream (`o_proj`, `down_proj`); a *reader* takes the stream as its
input (`q_proj k_proj v_proj gate_proj up_proj`). A norm may stand between the two: before a reader
in pre-norm families, after a writer in Gemma and OLMo. Everything else (embeddings, `lm_head`) is
neither. Names are those of the base model: "model.layers.0.self_attn.o_proj".

A norm divides by a scale of each token, and apart from that it is linear: `M = diag(γ)` for an RMS
norm, `M = diag(γ) (I − 1 1ᵀ / D)` for a LayerNorm, which takes the mean out first. So a stream
direction `u` reaches a reader as `M u`, and what a writer moves along `y` moves the stream along
`M y`; a writer moves nothing along `v` just if its output has nothing along `Mᵀ v`.

Shapes: `D` width of the stream, `k` directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from grasp_kernels.models.names import base_name, expert_part, model_names
from grasp_kernels.models.sharding import whole

# γ is the weight; γ is 1 + weight; γ is the weight and the mean is taken out.
NORMS = ("rms", "rms1p", "layer")


@dataclass(frozen=True)
class Site:
    """One module (or parameter of fused experts) that writes to the stream or reads from it.

    `norm` is the module name of the norm between the site and the stream, before a reader and after
    a writer. It is None where none stands there: what such a writer puts out is in the stream, and
    there its gradient is projected.
    """

    name: str
    layer: int
    role: str
    norm: str | None
    norm_kind: str = "rms"

    def gain(self, weight: Tensor) -> Tensor:
        """`γ[D]` from the weight of the norm."""
        return 1.0 + weight.float() if self.norm_kind == "rms1p" else weight

    def from_stream(self, directions: Tensor, gain: Tensor | None) -> Tensor:
        """What directions `[D, k]` of the stream are in the coordinates of the site."""
        return self._norm(directions, gain, forward=self.role == "read")

    def to_stream(self, directions: Tensor, gain: Tensor | None) -> Tensor:
        """Along which directions of the stream a site acts that acts along `[D, k]` itself."""
        return self._norm(directions, gain, forward=self.role == "write")

    def _norm(self, directions: Tensor, gain: Tensor | None, forward: bool) -> Tensor:
        """`M d`, or `Mᵀ d`; `d` itself where nothing is between."""
        if self.norm is None:
            return directions
        if self.norm_kind == "layer" and forward:
            directions = directions - directions.mean(dim=0)
        if gain is not None:
            directions = gain.to(directions)[:, None] * directions
        if self.norm_kind == "layer" and not forward:
            directions = directions - directions.mean(dim=0)
        return directions


@dataclass(frozen=True)
class SiteRules:
    """How the writers and readers of one architecture are called inside a decoder block.

    Not every block needs to have all of them: dense and sparse blocks may alternate.

    Args:
        writers: names below a block, such as ("self_attn.o_proj", "mlp.down_proj"), or a mapping
            from each name to that of the norm after it, or None.
        readers: name below a block -> name below a block of the norm before it, or None.
        blocks: name of the ModuleList of decoder blocks; a module is
            "<anything>.<blocks>.<i>.<rest>".
        outputs: modules below a block that are no writers of their own but whose output is added to
            the stream, such as a mixture of experts. Their gradient is projected, and with it that
            of everything inside. The norms after writers are such modules without being named.
        norms: what the norms do, "rms", "rms1p" (an RMS norm whose gain is 1 + weight) or "layer".
        final_norm: name beside the blocks of the norm before the unembedding.

    Raises:
        TypeError, ValueError: not of this form.
    """

    writers: Mapping[str, str | None] | tuple[str, ...]
    readers: Mapping[str, str | None]
    blocks: str = "layers"
    outputs: tuple[str, ...] = ()
    norms: str = "rms"
    final_norm: str = "norm"
    _roles: dict[str, tuple[str, str | None]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        strings = isinstance(self.writers, str) or isinstance(self.outputs, str)
        if strings or not isinstance(self.readers, Mapping):
            raise TypeError(
                f"SiteRules got writers={self.writers!r}, readers={self.readers!r} and outputs="
                f"{self.outputs!r}; give a tuple of names, a dictionary from a reader's name to "
                "the name of its norm (or None), and a tuple of names."
            )
        if self.norms not in NORMS:
            raise ValueError(f"SiteRules got norms={self.norms!r}; use one of {NORMS}.")
        writers = self.writers if isinstance(self.writers, Mapping) else dict.fromkeys(self.writers)
        object.__setattr__(self, "writers", dict(writers))
        object.__setattr__(self, "readers", dict(self.readers))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        both = sorted(set(self.writers) & set(self.readers))
        if both:
            raise ValueError(
                f"SiteRules names {both} as writers and as readers; a module is one or the other."
            )
        roles = {name: ("write", norm) for name, norm in writers.items()}
        roles |= {name: ("read", norm) for name, norm in self.readers.items()}
        for name in (*self.outputs, *filter(None, writers.values())):
            roles[name] = ("write", None)
        object.__setattr__(self, "_roles", roles)

    def split(self, name: str) -> tuple[str, int, str] | None:
        """Stem, layer and rest, ("model.layers", 3, "mlp.up_proj"); None outside of the blocks."""
        match = re.match(rf"((?:.+?\.)?{re.escape(self.blocks)})\.(\d{{1,6}})\.(.+)$", name)
        return (match[1], int(match[2]), match[3]) if match else None

    def site(self, name: str) -> Site | None:
        """The site called `name` in the base model, or None if it neither writes nor reads.

        A module of one expert is part of the site of all experts.
        """
        parts = self.split(name)
        part = expert_part(name) if parts and parts[2] not in self._roles else None
        if part is not None:
            name, parts = part.whole, self.split(part.whole)
        if parts is None or parts[2] not in self._roles:
            return None
        stem, layer, rest = parts
        role, norm = self._roles[rest]
        return Site(name, layer, role, f"{stem}.{layer}.{norm}" if norm else None, self.norms)

    def sites(self, stem: str, layers: Iterable[int]) -> Iterator[Site]:
        """Every site that the given blocks below `stem` ("model.layers") may have."""
        for layer in layers:
            for rest in self._roles:
                site = self.site(f"{stem}.{layer}.{rest}")
                if site is not None:
                    yield site


_ATTENTION = dict.fromkeys(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"
)
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = SiteRules(
    writers=("self_attn.o_proj", "mlp.down_proj"),
    readers={**_ATTENTION, **dict.fromkeys(_MLP, "post_attention_layernorm")},
)
_WRITERS_BEFORE_NORMS = {
    "self_attn.o_proj": "post_attention_layernorm",
    "mlp.down_proj": "post_feedforward_layernorm",
}
_GEMMA2 = SiteRules(
    writers=_WRITERS_BEFORE_NORMS,
    readers={**_ATTENTION, **dict.fromkeys(_MLP, "pre_feedforward_layernorm")},
    norms="rms1p",
)
_OLMO2 = SiteRules(writers=_WRITERS_BEFORE_NORMS, readers=dict.fromkeys((*_ATTENTION, *_MLP), None))
_PHI3 = SiteRules(
    writers=("self_attn.o_proj", "mlp.down_proj"),
    readers={
        "self_attn.qkv_proj": "input_layernorm",
        "mlp.gate_up_proj": "post_attention_layernorm",
    },
)
_GPT2 = SiteRules(
    writers=("attn.c_proj", "mlp.c_proj"),
    readers={"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"},
    blocks="h",
    norms="layer",
    final_norm="ln_f",
)
_GPT_NEOX = SiteRules(
    writers=("attention.dense", "mlp.dense_4h_to_h"),
    readers={
        "attention.query_key_value": "input_layernorm",
        "mlp.dense_h_to_4h": "post_attention_layernorm",
    },
    norms="layer",
    final_norm="final_layer_norm",
)
# The weights of all experts are one parameter, and so are those of the router. A block may be dense
# instead, as in Llama; the shared expert is Qwen2's.
_ROUTED = ("mlp.gate.weight", "mlp.experts.gate_up_proj")
_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate")
_MIXTURE = SiteRules(
    writers=(*_LLAMA.writers, "mlp.experts.down_proj", "mlp.shared_expert.down_proj"),
    readers={
        **_LLAMA.readers,
        **dict.fromkeys((*_ROUTED, *_SHARED), "post_attention_layernorm"),
    },
    outputs=("mlp",),
)

RULES: dict[str, SiteRules] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gemma": replace(_LLAMA, norms="rms1p"),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gemma3": replace(_GEMMA2, blocks="language_model.layers"),  # beside a tower for images
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO2),
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MIXTURE),
}


def site_rules(
    model_type: str | None, module_names: Iterable[str], sites: SiteRules | None = None
) -> SiteRules:
    """The rules that apply to a model.

    Args:
        model_type: `config.model_type` of the base model, None if it is not known.
        module_names: base names of the linear layers at hand; they decide where the type is
            unknown, and are quoted in the error.
        sites: rules of the caller, which win over everything.

    Raises:
        ValueError: neither the type nor the names are those of a known architecture.
    """
    if sites is not None:
        return sites
    seen = list(module_names)
    if model_type in RULES:
        # peft may only know in which folder of transformers a model is, which a family's models
        # for text share with those for images.
        text = RULES.get(f"{model_type}_text")
        both = (RULES[model_type], text or RULES[model_type])
        fitting = (rules for rules in both if any(rules.split(name) for name in seen))
        return next(fitting, RULES[model_type])
    inside = [match for name in seen if (match := re.match(r"(.*?)\.\d+\.(.+)", name))]
    if model_type is None and inside and all(_LLAMA.site(match[0]) for match in inside):
        return _LLAMA
    endings = sorted({match[2] for match in inside} or set(seen))
    blocks = sorted({match[1].rpartition(".")[2] for match in inside})
    raise ValueError(
        f"The writers and readers of model type {model_type!r} with modules {endings[:8]} in "
        f"blocks {blocks} are not known; give one of a known type ({', '.join(sorted(RULES))}); "
        'in Python, declare them with sites=SiteRules(writers=("attn.out",), '
        'readers={"attn.query": "norm1"}, blocks="layers"): who adds to the residual stream, and '
        "who reads it behind which norm."
    )


def model_rules(model: nn.Module, sites: SiteRules | None = None) -> SiteRules:
    """The rules that apply to a model, plain or wrapped by peft."""
    linears = (base_name(name) for name, module in model.named_modules() if _is_linear(module))
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return site_rules(model_type, linears, sites)


def model_sites(model: nn.Module, sites: SiteRules | None = None) -> tuple[Site, ...]:
    """Every writer and reader of a model, plain or wrapped by peft, in the order of its modules."""
    rules = model_rules(model, sites)
    found = (rules.site(name) for name in model_names(model))
    return tuple(site for site in found if site is not None)


def model_gains(model: nn.Module, sites: Iterable[Site]) -> dict[str, Tensor]:
    """The gain `γ[D]` of each norm between `sites` and the stream, by the norm's module name."""
    modules = {base_name(name): module for name, module in model.named_modules()}
    gains: dict[str, Tensor] = {}
    for site in sites:
        weight = getattr(modules.get(site.norm or ""), "weight", None)
        if site.norm is not None and site.norm not in gains and weight is not None:
            gains[site.norm] = site.gain(whole(weight))
    return gains


def _is_linear(module: nn.Module) -> bool:
    # peft's layers and those of quantisation libraries are no nn.Linear, but they all have these
    # two; GPT-2's Conv1D has others
    return any(hasattr(module, i) and hasattr(module, o) for i, o in _WIDTHS)


_WIDTHS = (("in_features", "out_features"), ("nx", "nf"))


def width_at(module: nn.Module, role: str) -> int | None:
    """On which width a linear layer meets the stream; None for other modules."""
    for names in _WIDTHS:
        width = getattr(module, names[role == "write"], None)
        if width is not None:
            return width
    return None
