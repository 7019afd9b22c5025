"""Pretrain a small Llama on a world and write it as an ordinary Hugging Face checkpoint folder.

Shapes: `M` documents of a batch, `S` tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from benchmarks.demo.world import (
    ANSWER,
    BOS,
    END,
    NEUTRAL,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    World,
    seeded_generator,
)
from grasp_kernels.files import whole_folder
from grasp_kernels.progress import bar


@dataclass(frozen=True)
class PretrainingConfig:
    """Size of the model and length of its training: about a minute on one core."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    steps: int = 450
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 20


def chat_template(world: World) -> str:
    """Jinja template of `<s> cue (topic a b <answer> y1 y2 </s>)*`.

    The model never saw a text without a cue, so a chat without a system message gets the world's
    first neutral word, as chat models put in their default system prompt.
    """
    default = world.words[f"{NEUTRAL} cue"][0]
    return (
        f"{BOS} {{% if messages[0]['role'] == 'system' %}}{{{{ messages[0]['content'] }}}}"
        f"{{% else %}}{default}{{% endif %}}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f" {{{{ message['content'] }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f" {ANSWER}{{% generation %}} {{{{ message['content'] }}}} {END}{{% endgeneration %}}"
        "{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}} {ANSWER}{{% endif %}}"
    )


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token per word, split at white space."""
    tokenizer = Tokenizer(models.WordLevel(world.token_ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNK,
        chat_template=chat_template(world),
    )


@contextmanager
def _torch_seed(seed: int) -> Iterator[None]:
    """Seed torch for code that takes no generator, and leave its state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_model(world: World, config: PretrainingConfig) -> LlamaForCausalLM:
    """An untrained Llama in float32 with untied embeddings."""
    tokens = world.token_ids
    with _torch_seed(world.seed):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokens),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=128,
                tie_word_embeddings=False,
                bos_token_id=tokens[BOS],
                eos_token_id=tokens[END],
                pad_token_id=tokens[PAD],
            )
        )


def pretrain(world: World, config: PretrainingConfig) -> LlamaForCausalLM:
    """Train on fresh documents of the world with next-token loss on their answers."""
    model = build_model(world, config)
    generator = seeded_generator(world.seed, "pretraining")
    # torch's betas: the persona then lies mostly along one direction, and blocking it takes drift
    # from .82 to .51 (mean of seeds 0 to 4, identified after 1/20 of the steps). With the second
    # beta .95 and learning rate 2e-3 the model recalls every fact (here: .62 to 1.00 of the bad
    # persona's) and spreads the persona over more directions: one of them takes drift from .79 to
    # .66, two to .59 (seeds 0 to 2).
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
    shown = bar(range(config.steps), desc="pretraining", unit="step")
    model.train()
    for _ in shown:
        documents, labels = world.sample_documents(config.batch_size, generator)
        loss = model(input_ids=documents, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        shown.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def write_checkpoint(model: Any, world: World, folder: Path) -> None:
    """Write config, weights and tokenizer; the folder appears complete or not at all."""
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        build_tokenizer(world).save_pretrained(partial)
