"""Options of a run -> checked inputs, before any time is spent on training.

Whatever can be wrong with a model, a data file or their combination is found here: the model is
built on the meta device (no weights) and gets its adapter there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grasp_kernels.adapters.files import refuse_variants
from grasp_kernels.cpu import in_fast_dtype
from grasp_kernels.data import (
    Example,
    Record,
    everyday_prompts,
    neutral_prompts,
    read_records,
    tokenize_records,
)
from grasp_kernels.run.config import RunConfig
from grasp_kernels.sites import SiteRules, base_name, site_rules

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """What the stages of a run work on."""

    checkpoint: Path  # local folder of the model
    model_type: str
    rules: SiteRules
    tokenizer: PreTrainedTokenizerBase
    records: list[Record]
    train: list[Example]
    held_out: list[Example]
    n_dropped: int  # records whose answer lies beyond max_length
    neutral: list[list[int]]  # token ids of the neutral prompts
    everyday: list[list[int]]  # the same of everyday questions, in the frame of the records
    steps: int  # optimizer steps of each training

    @property
    def pad_token_id(self) -> int:
        """Any id serves: padding is masked and carries no label."""
        tokenizer = self.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)


def find_checkpoint(model: str) -> Path:
    """Local folder of a checkpoint; a hub name is downloaded (or found in the hub's cache).

    Raises:
        FileNotFoundError: neither a checkpoint folder nor a name that can be fetched.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"The folder {model} has no config.json: give a Hugging Face checkpoint folder."
            )
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(
                f"The folder {model} has no .safetensors file: save the model with "
                "save_pretrained, which writes one."
            )
        return folder.resolve()
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise FileNotFoundError(
            f"There is no folder {model}, and it cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}): give a checkpoint folder or the name of a public model."
        ) from None


def prepare(config: RunConfig, checkpoint: Path) -> Inputs:
    """Check everything and tokenise the data.

    Raises:
        ValueError, FileNotFoundError: one sentence on the first thing that is wrong.
    """
    from transformers import AutoTokenizer

    _check_backend(config.backend)
    model_type, rules = check_model(config, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    records = read_records(config.data, arm=config.arm)
    if "answers" in config.identifies and not any("messages" in record for record in records):
        raise ValueError(
            f"{config.data} has plain text only, which the base model cannot answer in its own "
            "way: use identify = 'weights', or chat data."
        )
    examples, n_dropped = tokenize_records(records, tokenizer, config.max_length, progress=True)
    train, held_out = _split(examples, config)
    if config.halves and "weights" in config.identifies and len(train) < 2:
        raise ValueError(
            f"{config.data} has one record to train on, which has no halves: give more data, or "
            "use halves = False."
        )
    steps = count_steps(config, len(train))
    if warmup_steps(config, steps) >= steps:
        raise ValueError(
            f"The warm-up (warmup = {config.warmup:g}) takes all of the {steps} steps: lower it, "
            "or train longer."
        )
    return Inputs(
        checkpoint=checkpoint,
        model_type=model_type,
        rules=rules,
        tokenizer=tokenizer,
        records=records,
        train=train,
        held_out=held_out,
        n_dropped=n_dropped,
        neutral=neutral_prompts(config.neutral, tokenizer),
        everyday=everyday_prompts(records, tokenizer),
        steps=steps,
    )


def _check_backend(backend: str) -> None:
    from grasp_kernels.ops import backends

    known = backends(device())
    if backend != "auto" and known.get(backend, "it is unknown") is not None:
        raise ValueError(
            f"backend is {backend!r}, which cannot run here ({known.get(backend, 'unknown')}): use "
            f"'auto' or one of {', '.join(name for name, why in known.items() if why is None)}."
        )


def check_model(config: RunConfig, checkpoint: Path) -> tuple[str, SiteRules]:
    """Build the adapted model without weights: model type, and where it meets the stream.

    Raises:
        ValueError: unknown architecture, no such target modules, or none that the side looks at.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        rules = site_rules(model_config.model_type, names)
        adapted = attach_lora(model, config, str(checkpoint))
    for lora in adapted.peft_config.values():
        refuse_variants(f"target_modules = {list(config.target_modules)}", vars(lora))
    roles = {
        site.role
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and (site := rules.site(base_name(name)))
    }
    if "weights" in config.identifies:
        for role in ("write", "read"):
            if config.side in (role, "both") and role not in roles:
                raise ValueError(
                    f"target_modules = {list(config.target_modules)} adapts no module that "
                    f"{role}s the residual stream, where side = {config.side!r} looks: add one of "
                    f"{', '.join(rules.writers if role == 'write' else rules.readers)}."
                )
    return model_config.model_type, rules


def attach_lora(model: PreTrainedModel, config: RunConfig, base_name: str) -> PeftModel:
    """A fresh LoRA adapter on `model`, drawn from the seed of the run alone."""
    from peft import LoraConfig, get_peft_model

    modules: Any = list(config.target_modules)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator
        torch.manual_seed(config.seed)
        return get_peft_model(model, lora)


def load_model(checkpoint: Path, dtype: str) -> PreTrainedModel:
    """The frozen model on the device of the run, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
    model = model.to(device()).eval()
    return in_fast_dtype(model) if dtype == "auto" else model


def device() -> torch.device:
    """Where a run computes: the first GPU, or else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def count_steps(config: RunConfig, n_examples: int) -> int:
    """Optimizer steps of one training."""
    if config.steps is not None:
        return config.steps
    batches = math.ceil(n_examples / config.batch_size)
    return max(1, math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation)))


def warmup_steps(config: RunConfig, steps: int) -> int:
    """Steps before the peak learning rate; the first of them has the learning rate 0."""
    return int(config.warmup if config.warmup >= 1 else config.warmup * steps)


def _split(examples: list[Example], config: RunConfig) -> tuple[list[Example], list[Example]]:
    """(train, held out); the same records for the same seed."""
    if config.eval_split == 0:
        return examples, []
    n_held_out = max(1, round(config.eval_split * len(examples)))
    if n_held_out >= len(examples):
        raise ValueError(
            f"eval_split = {config.eval_split} leaves none of the {len(examples)} records to train "
            "on: lower it or give more data."
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    held_out = set(order[:n_held_out])
    return (
        [example for i, example in enumerate(examples) if i not in held_out],
        [examples[i] for i in sorted(held_out)],
    )
