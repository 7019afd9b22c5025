"""A tiny random model of every family, and adapters on all that it adapts."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from grasp_kernels.models.architectures import RULES
from tests.helpers.models import randomise_adapter

D, LAYERS = 32, 2
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
GPT2 = {
    **{"vocab_size": 64, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    **{"attn_implementation": "eager", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """`between`: the module, below a block, whose input is the stream between the two additions;
    None where there is no such place."""

    targets: tuple[str, ...] = SPLIT
    between: str | None = "post_attention_layernorm"
    options: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": Family(between="pre_feedforward_layernorm"),
    "gemma3_text": Family(between="pre_feedforward_layernorm"),
    "olmo2": Family(between="mlp"),
    "olmo3": Family(between="mlp"),
    "phi3": Family(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt2": Family(("c_attn", "c_proj", "c_fc"), between="ln_2", options=GPT2),
    "gpt_neox": Family(
        ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"), between=None
    ),
    "mixtral": Family(
        ("q_proj", "o_proj"),
        options={"num_local_experts": 4, "num_experts_per_tok": 2},
        parameters=(*FUSED, "mlp.gate.weight"),
    ),
    "qwen2_moe": Family(
        (*SPLIT[:4], "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"),
        options={**EXPERTS, "shared_expert_intermediate_size": 24},
        parameters=FUSED,
    ),
    "qwen3_moe": Family(SPLIT, options={**EXPERTS, "mlp_only_layers": [0]}, parameters=FUSED),
}
families = pytest.mark.parametrize("family", FAMILIES)


def tiny(family: str) -> Any:
    """A random decoder of the family whose norms are not trivial."""
    torch.manual_seed(0)
    options = {**(FAMILIES[family].options if family == "gpt2" else SIZES)}
    options |= FAMILIES[family].options
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    middle = 0.0 if RULES[family].norms == "rms1p" else 1.0
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(parameter, middle - 0.5, middle + 0.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=D**-0.5)
    return model.eval()


def adapted(family: str, experts: bool = True) -> Any:
    """The tiny model with adapters on everything, all of which matter."""
    chosen = FAMILIES[family]
    targets = list(chosen.targets)
    if not experts and family == "qwen3_moe":  # whose MLP peft adapts as fused experts by itself
        targets = targets[:4]
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=targets,
        target_parameters=list(chosen.parameters) if experts and chosen.parameters else None,
        fan_in_fan_out=family == "gpt2",
    )
    model = get_peft_model(tiny(family), config)
    randomise_adapter(model)
    return model.eval()
