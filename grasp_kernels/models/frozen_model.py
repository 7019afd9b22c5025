"""A frozen causal language model: its own answers, and its logits at chosen positions.

Shapes: `B` sequences of a batch, `T` tokens of the longest of them, `V` vocabulary, `D` residual
width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grasp_kernels import processes
from grasp_kernels.progress import bar

_IGNORE_PADDING = ("recurrent_gemma", "rwkv")  # other answers in a batch than alone


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Set eval mode and disable gradients inside the context.

    Modes and gradient flags are restored one by one: peft sets the flags of an adapter when
    switching it off and on, and a user may have frozen only some modules.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def frozen_base(model: Any, *, adapter: bool = False) -> Iterator[Any]:
    """Lend the base model of `model` for measuring: adapters off, eval mode, no gradients.

    Modes, gradient flags and generation settings are restored. With `adapter` the active adapter of
    a PeftModel stays on.

    Raises:
        TypeError: neither a causal language model of transformers nor a PeftModel of one.
    """
    base = model.get_base_model() if hasattr(model, "disable_adapter") else model
    config = getattr(base, "config", None)
    can_generate = hasattr(base, "generate") and hasattr(base, "generation_config")
    if not can_generate or getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(base).__name__} cannot generate answers: give a causal language model of "
            "transformers (AutoModelForCausalLM) or a PeftModel of one."
        )
    generation_config = base.generation_config
    try:
        with (
            measuring(model),
            nullcontext() if adapter or base is model else model.disable_adapter(),
        ):
            yield base
    finally:
        base.generation_config = generation_config


@contextmanager
def head_at(model: Any, index: Tensor | tuple[Tensor, ...]) -> Iterator[None]:
    """Give the head of a causal language model chosen positions alone: no `[B, T, V]` logits.

    Args:
        model: the model, a PeftModel of it, or either in a wrapper such as that of DDP.
        index: an index of positions in the stream `[B, T, D]`, a mask `[B, T]` or rows and columns;
            the logits have the positions first.
    """
    inside = model.module if hasattr(model, "module") else model
    parts = index if isinstance(index, tuple) else (index,)

    def choose(_head: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        hidden = inputs[0]  # on another device than the embeddings where a model is spread
        return hidden[tuple(part.to(hidden.device) for part in parts)]

    hook = inside.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _whole_rows_at_head(model: Any) -> Iterator[None]:
    """Give the head of a causal language model hidden states that lie together in memory.

    `generate` gives it the last position of each sequence, a slice. torch 2.13 multiplies a slice
    by one copy of a frozen weight a sequence: on a CPU in bfloat16, 8 sequences and a weight of 64
    MB took 512 MB and 11 s, where the copied rows take 0.03 s.
    """

    def together(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].contiguous(), *inputs[1:])

    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(together)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def generate_answers(
    base: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    end_ids: Iterable[int],
    generator: torch.Generator | None = None,
    progress: str | None = None,
    is_shared: bool = False,
) -> list[list[int]]:
    """Generate the model's own answers: greedy, or sampled at temperature 1 with a `generator`.

    The checkpoint's generation settings (temperature, penalties, forced tokens) are left aside, for
    the contrast is with the model's own distribution. `base` comes from `frozen_base`, which
    restores the settings.

    Args:
        is_shared: whether all processes of a run call this, and each makes a part of the answers.

    Returns:
        Token ids, one answer per prompt, up to and including its end token.
    """
    from transformers import GenerationConfig

    ends = sorted(set(end_ids))
    base.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    if base.config.model_type in _IGNORE_PADDING:
        batch_size = 1
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # for little padding
    starts = range(0, len(order), batch_size)
    # A seed for each batch, so that the number of processes changes no answer.
    seeds = [0] * len(starts)
    if generator is not None:
        seeds = torch.randint(2**62, (len(starts),), generator=generator).tolist()
    numbers = processes.shares(len(starts)) if is_shared else range(len(starts))
    for number in bar(numbers, desc=progress, unit="part", disable=progress is None):
        batch = order[starts[number] : starts[number] + batch_size]
        drawn = [] if generator is None else [_Sampled(seeds[number])]
        input_ids, attention_mask = pad(base, [prompts[i] for i in batch], "left")
        with _whole_rows_at_head(base):
            output = base.generate(
                input_ids=input_ids, attention_mask=attention_mask, logits_processor=drawn
            )
        for i, row in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
            stop = next((n for n, token in enumerate(row) if token in ends), len(row) - 1)
            answers[i] = row[: stop + 1]
    answers = processes.together(answers) if is_shared else answers
    return [answers[i] for i in range(len(prompts))]


class _Sampled:
    """Make greedy decoding a sample from softmax(logits), by its sums and one number a row.

    `generate` itself samples from the global generator and takes no other. Noise for every logit
    took as long as the model: SmolLM2-135M, 64 rows, one core, 135 ms a token.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sums = scores.float().softmax(dim=-1).double().cumsum(dim=-1)
        drawn = torch.rand(len(sums), 1, generator=self.generator, dtype=torch.float64)
        tokens = torch.searchsorted(sums, drawn.to(sums.device) * sums[:, -1:], right=True)
        tokens = tokens.clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)


def pad(base: Any, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, int64 `[B, T]`, on the embeddings' device."""
    ids = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    device = base.get_input_embeddings().weight.device
    padded = (pad_sequence(part, batch_first=True, padding_side=side) for part in (ids, ones))
    input_ids, attention_mask = (tensor.to(device) for tensor in padded)
    return input_ids, attention_mask
