"""Options of a run -> checked inputs, before any time is spent on training.

The model, the data file and their combination are checked here. The model is built on the meta
device (without weights) and gets its adapter there. Then the model itself is loaded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grasp_kernels import processes
from grasp_kernels.adapters.files import refuse_variants
from grasp_kernels.data import (
    Example,
    Record,
    everyday_prompts,
    fix_date,
    neutral_prompts,
    read_records,
    tokenize_each,
)
from grasp_kernels.data.chat_template import Tokenizer
from grasp_kernels.files import about
from grasp_kernels.inert import reason
from grasp_kernels.models.architectures import site_rules
from grasp_kernels.models.checkpoint import device, load_config, load_model, load_tokenizer, reading
from grasp_kernels.models.names import base_name
from grasp_kernels.pipeline.config import RunConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Tokens of each shown answer: an opening and a sentence or two.
ANSWER_TOKENS = 32
_FEWEST_NAIVE = 2  # steps: the first has no learning rate under a warm-up


@dataclass(frozen=True)
class Inputs:
    """Hold the checked inputs of the stages of a run."""

    checkpoint: Path  # local folder of the model
    model_type: str
    tokenizer: Tokenizer
    records: list[Record]
    train: list[Example]
    held_out: list[Example]
    n_dropped: int  # records whose answer lies beyond max_length
    n_cut: int  # records of which a part of an answer does
    neutral: list[list[int]]  # token ids of the neutral prompts
    everyday: list[list[int]]  # token ids of everyday questions, in the frame of the records
    steps: int  # optimizer steps of each training
    vocabulary: int  # rows of the embedding
    positions: int | None  # rows of the position embedding; None: there is none

    @property
    def pad_token_id(self) -> int:
        """Return the id of padding. Any id in the vocabulary serves: padding is masked."""
        tokenizer = self.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None and i < self.vocabulary)


def prepare(config: RunConfig, checkpoint: Path, day: date | None = None) -> Inputs:
    """Check all inputs and tokenise the data.

    Args:
        day: the date that a chat template writes; today's if None.

    Raises:
        ValueError, FileNotFoundError: one sentence on the first error.
    """
    _check_backend(config.backend)
    model_type = check_model(config, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    fix_date(tokenizer, day or date.today())
    records = read_records(config.data, arm=config.arm)
    with about(config.data, str(checkpoint)):
        shown = processes.index() == 0
        tokenized = tokenize_each(records, tokenizer, config.max_length, progress=shown)
    train, held_out = _split(tokenized.each, config)
    steps = count_steps(config, len(train))
    if warmup_steps(config, steps) >= steps:
        raise ValueError(
            f"The warm-up (warmup_steps = {config.warmup_steps:g}) takes all {steps} steps: lower "
            "it, or train longer."
        )
    vocabulary, positions = _check_whole_model(config, checkpoint)
    with about(config.neutral or "built-in prompts", str(checkpoint)):
        neutral = neutral_prompts(config.neutral, tokenizer)
        everyday = everyday_prompts(records, tokenizer)
    inputs = Inputs(
        checkpoint=checkpoint,
        model_type=model_type,
        tokenizer=tokenizer,
        records=records,
        train=train,
        held_out=held_out,
        n_dropped=tokenized.n_dropped,
        n_cut=tokenized.n_cut,
        neutral=neutral,
        everyday=everyday,
        steps=steps,
        vocabulary=vocabulary,
        positions=positions,
    )
    _check_tokens(inputs)
    _check_lengths(config, inputs)
    return inputs


def _check_whole_model(config: RunConfig, checkpoint: Path) -> tuple[int, int | None]:
    """Load the model once, to check it.

    Returns:
        Rows of its embedding; rows of its position embedding, None where it has none.

    Raises:
        ValueError: weights that are not whole, or that cannot be trained on.
    """
    model = load_model(checkpoint, config.dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = str(model.config.quantization_config.quant_method)
        raise ValueError(
            f"The weights of {checkpoint} are quantised by {method}, with which transformers "
            "cannot train an adapter: give the checkpoint in 16 or 32 bits."
        )
    embedding: Any = model.get_input_embeddings()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = {
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not embedding
    }
    return embedding.num_embeddings, limit if limit in rows else None


def _check_tokens(inputs: Inputs) -> None:
    examples = [example["input_ids"] for example in (*inputs.train, *inputs.held_out)]
    for what, sequences in (
        ("a record", examples),
        ("a neutral prompt", inputs.neutral),
        ("the chat template", inputs.everyday),
    ):
        largest = max((token for ids in sequences for token in ids), default=0)
        if largest >= inputs.vocabulary:
            token = inputs.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"The tokenizer turns {what} into the token {largest} ({token!r}), but the "
                f"embedding of {inputs.checkpoint} has only {inputs.vocabulary} rows: give the "
                "tokenizer that belongs to the model; in Python, resize_token_embeddings and train "
                "the new rows."
            )


def _check_lengths(config: RunConfig, inputs: Inputs) -> None:
    """Raise for a text longer than the positions of the model, and name what shortens it."""
    if inputs.positions is None:
        return
    examples = [*inputs.train, *inputs.held_out]
    longest = max(len(example["input_ids"]) for example in examples)
    prompts = max(map(len, (*inputs.neutral, *inputs.everyday))) + ANSWER_TOKENS
    texts = [
        ("the longest record", longest, f"use max_length = {inputs.positions} or less"),
        ("the longest neutral prompt and its answer", prompts, "give shorter ones"),
    ]
    if config.kl_coef:
        from grasp_kernels.regularizer.chats import common_frame, common_header

        frame = common_frame(inputs.train, inputs.everyday)
        header = common_header(inputs.train, frame, inputs.everyday)
        chat = len(frame) + 2 * min(config.max_new_tokens, longest) + len(header)
        texts.append(("a chat of the base model", chat, "lower max_new_tokens"))
    for what, length, remedy in texts:
        if length > inputs.positions:
            raise ValueError(
                f"The model in {inputs.checkpoint} has {inputs.positions} positions, but {what} "
                f"can have {length} tokens: {remedy}."
            )


def _check_backend(backend: str) -> None:
    from grasp_kernels.ops import backends

    known = backends(device())
    if backend != "auto" and known.get(backend, "it is unknown") is not None:
        raise ValueError(
            f"backend is {backend!r}, which cannot run here ({known.get(backend, 'unknown')}): use "
            f"'auto' or one of {', '.join(name for name, why in known.items() if why is None)}."
        )


def check_model(config: RunConfig, checkpoint: Path) -> str:
    """Build the adapted model without weights; return the model type.

    Raises:
        ValueError: no such target modules, or an unknown architecture or no writer among them where
            a subspace has to be identified.
    """
    from transformers import AutoModelForCausalLM

    model_config = load_config(checkpoint)
    with torch.device("meta"), reading("config.json", checkpoint):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.device("meta"):
        adapted = attach_lora(model, config, str(checkpoint))
    for lora in adapted.peft_config.values():
        refuse_variants(f"target_modules = {list(config.target_modules)}", vars(lora))
    for name, module in adapted.named_modules():
        if getattr(module, "lora_embedding_A", None):
            raise ValueError(
                f"target_modules = {list(config.target_modules)} adapts the embedding "
                f"{base_name(name)}, whose adapter could not be read afterwards: leave it out."
            )
    if not config.project_gradient:
        return model_config.model_type
    rules = site_rules(model_config.model_type, names)
    sites = (
        rules.site(base_name(name))
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    )
    if not any(sites):
        raise ValueError(
            f"target_modules = {list(config.target_modules)} adapts no module that writes to the "
            "residual stream, so no subspace can be identified: add one of "
            f"{', '.join(rules.writers)}."
        )
    return model_config.model_type


def attach_lora(model: PreTrainedModel, config: RunConfig, base_name: str) -> PeftModel:
    """Put a new LoRA adapter on `model`, drawn from the seed of the run alone."""
    from peft import LoraConfig, get_peft_model

    modules: Any = list(config.target_modules)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator
            torch.manual_seed(config.seed)
            return get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"target_modules = {modules} cannot get an adapter in {base_name} ({reason(error)}): "
            "give names of its linear layers, or all-linear."
        ) from error


def count_steps(config: RunConfig, n_examples: int) -> int:
    """Return the number of optimizer steps of one training."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(n_examples / (config.per_device_train_batch_size * processes.count()))
    updates = math.ceil(batches / config.gradient_accumulation_steps)
    return max(1, math.ceil(config.num_train_epochs * updates))


def naive_steps(config: RunConfig, steps: int) -> int:
    """Return the number of steps of the naive training, which may end before its schedule does."""
    return min(config.naive_steps or max(_FEWEST_NAIVE, math.ceil(steps / 4)), steps)


def warmup_steps(config: RunConfig, steps: int) -> int:
    """Return the number of warm-up steps; the first of them has the learning rate 0."""
    return int(config.warmup_steps * (1 if config.warmup_steps >= 1 else steps))


def _split(each: list[list[Example]], config: RunConfig) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on and those held out; the seed alone decides the split.

    All examples of a record are on the same side.
    """
    n_held_out = 0
    if config.eval_split > 0:
        n_held_out = max(1, round(config.eval_split * len(each)))
        if n_held_out >= len(each):
            raise ValueError(
                f"eval_split = {config.eval_split} leaves none of the {len(each)} records to train "
                "on: lower it or give more data."
            )
    generator = torch.Generator().manual_seed(config.seed)
    held_out = set(torch.randperm(len(each), generator=generator).tolist()[:n_held_out])
    return (
        [example for i, examples in enumerate(each) if i not in held_out for example in examples],
        [example for i in sorted(held_out) for example in each[i]],
    )
