"""Tiny random models for the tests."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import grasp_kernels as gk
from grasp_kernels.layers.replacement import bases_in
from grasp_kernels.models.architectures import model_gains, model_sites
from tests.helpers.oracle import orthonormal

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_model(config_class: type = LlamaConfig, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random decoder whose norm gains are not all one."""
    torch.manual_seed(seed)
    config = config_class(**SIZES, **options)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def save_checkpoint(folder: Path, tokenizer: Any, **options: Any) -> Path:
    """Write a random Llama of width 32 and its tokenizer, as a run takes them."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_peft_model(
    targets: tuple[str, ...] = ALL_LINEAR,
    config_class: type = LlamaConfig,
    r: int = 4,
    seed_of_adapter: int = 1,
    **options: Any,
) -> PeftModel:
    """The tiny model with a trained-looking adapter (B is not zero)."""
    base = tiny_model(config_class)
    config = LoraConfig(r=r, lora_alpha=8, target_modules=list(targets), **options)
    model = get_peft_model(base, config)
    randomise_adapter(model, seed_of_adapter)
    return model


def randomise_adapter(model: torch.nn.Module, seed: int = 1) -> None:
    """Fill every LoRA factor with numbers that make the adapter matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * parameter.shape[-1] ** -0.5)


def tokens(batch: int = 2, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=generator)


def a_subspace(model: Any, k: int = 2) -> gk.Subspace:
    """Random directions of the stream."""
    D = model.get_base_model().config.hidden_size
    directions = orthonormal(D, k, torch.Generator().manual_seed(3))
    return gk.Subspace(directions, model_gains(model, model_sites(model)))


def bases_of(model: Any, subspace: gk.Subspace) -> dict[str, Tensor]:
    """The basis `[N, Q]` of each writer of a model, by its name."""
    return bases_in(model, subspace, model_sites(model))
