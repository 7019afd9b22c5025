"""Where a module touches the residual stream of a pre-norm decoder.

A *writer* adds its output to the stream (`o_proj`, `down_proj`); a *reader* takes the normalised
stream as its input (`q_proj k_proj v_proj gate_proj up_proj`). Everything else (embeddings,
`lm_head`) is neither. Names are those of the base model: "model.layers.0.self_attn.o_proj".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from grasp_kernels.processes import whole


@dataclass(frozen=True)
class Site:
    """One linear layer that writes to the stream or reads from it.

    `norm` is the module name of the norm whose gain sits between the stream and a reader; it is
    None for writers, and for readers behind a norm without a gain.
    """

    name: str
    layer: int
    role: str
    norm: str | None


@dataclass(frozen=True)
class SiteRules:
    """How the writers and readers of one architecture are called inside a decoder block.

    Args:
        writers: names below a block, such as ("self_attn.o_proj", "mlp.down_proj").
        readers: name below a block -> name below a block of the norm before it, or None.
        blocks: name of the ModuleList of decoder blocks; a module is
            "<anything>.<blocks>.<i>.<rest>".
    """

    writers: tuple[str, ...]
    readers: Mapping[str, str | None]
    blocks: str = "layers"

    def __post_init__(self) -> None:
        if isinstance(self.writers, str) or not isinstance(self.readers, Mapping):
            raise TypeError(
                f"SiteRules got writers={self.writers!r} and readers={self.readers!r}; give a "
                "tuple of names and a dictionary from a reader's name to the name of its norm (or "
                "None)."
            )
        object.__setattr__(self, "writers", tuple(self.writers))
        object.__setattr__(self, "readers", dict(self.readers))
        both = sorted(set(self.writers) & set(self.readers))
        if both:
            raise ValueError(
                f"SiteRules names {both} as writers and as readers; a module is one or the other."
            )

    def split(self, name: str) -> tuple[str, int, str] | None:
        """Stem, layer and rest, ("model.layers", 3, "mlp.up_proj"); None outside of the blocks."""
        match = re.match(rf"((?:.+?\.)?{re.escape(self.blocks)})\.(\d+)\.(.+)$", name)
        return (match[1], int(match[2]), match[3]) if match else None

    def site(self, name: str) -> Site | None:
        """The site called `name` in the base model, or None if it neither writes nor reads."""
        parts = self.split(name)
        if parts is None:
            return None
        stem, layer, rest = parts
        if rest in self.writers:
            return Site(name, layer, "write", None)
        if rest in self.readers:
            norm = self.readers[rest]
            return Site(name, layer, "read", f"{stem}.{layer}.{norm}" if norm else None)
        return None

    def sites(self, stem: str, layers: Iterable[int]) -> Iterator[Site]:
        """Every site of the given blocks below `stem` ("model.layers")."""
        for layer in layers:
            for rest in (*self.writers, *self.readers):
                site = self.site(f"{stem}.{layer}.{rest}")
                if site is not None:
                    yield site


_LLAMA = SiteRules(
    writers=("self_attn.o_proj", "mlp.down_proj"),
    readers={
        "self_attn.q_proj": "input_layernorm",
        "self_attn.k_proj": "input_layernorm",
        "self_attn.v_proj": "input_layernorm",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm",
    },
)

_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")

RULES: dict[str, SiteRules] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA)


def base_name(name: str) -> str:
    """The name without what wraps the module: DDP, FSDP, checkpointing, compilation, and peft's
    "base_model.model." before and ".base_layer" after."""
    name = _WRAPPERS.sub("", f"{name}.").removeprefix("module.")[:-1]
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


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
    if model_type in RULES:
        return RULES[model_type]
    endings = {}
    for name in module_names:
        parts = _LLAMA.split(name)
        if parts is not None:
            endings[parts[2]] = _LLAMA.site(name) is not None
        elif re.search(r"\.\d+\.", name):
            endings[re.split(r"\.\d+\.", name)[-1]] = False
    if model_type is None and endings and all(endings.values()):
        return _LLAMA
    raise ValueError(
        f"The writers and readers of model type {model_type!r} with modules {sorted(endings)[:8]} "
        "are not known; "
        'declare them with sites=SiteRules(writers=("attn.out",), '
        'readers={"attn.query": "norm1"}, blocks="layers").'
    )


def model_sites(model: nn.Module, sites: SiteRules | None = None) -> tuple[Site, ...]:
    """Every writer and reader of a model, plain or wrapped by peft, in the order of its modules."""
    linears = [base_name(name) for name, module in model.named_modules() if _is_linear(module)]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    rules = site_rules(model_type, linears, sites)
    found = (rules.site(name) for name in dict.fromkeys(linears))
    return tuple(site for site in found if site is not None)


def model_gains(model: nn.Module, sites: Iterable[Site]) -> dict[str, Tensor]:
    """The gain `[K]` of each norm before a reader of `sites`, by the norm's module name."""
    modules = {base_name(name): module for name, module in model.named_modules()}
    norms = dict.fromkeys(site.norm for site in sites if site.norm is not None)
    weights = {norm: getattr(modules.get(norm), "weight", None) for norm in norms}
    return {norm: whole(weight) for norm, weight in weights.items() if weight is not None}


def _is_linear(module: nn.Module) -> bool:
    # peft's layers and those of quantisation libraries are no nn.Linear, but they all have these
    # two
    return hasattr(module, "in_features") and hasattr(module, "out_features")
