"""Self-contrast: base model and training data -> Subspace, without labels and without training.

What the training answers have in common that the base model's own answers lack is a direction of
the residual stream: the mean, over records, of the frozen base model's stream on the training
answer minus its stream on the answer that it generates itself for the same prompt. It is a source
beside the weights of a naive fine-tune, not a part of GRASP as published; where answers are long it
was the better one by far (cosine with a planted persona .85 to .91, weights .1 to .3).

The gradient that arrives at a writer of block `l` belongs to the stream that the block hands on, so
both writers of a block get the direction found in the *output* of that block.

Shapes: `M` records, `L` blocks, `D` residual width, `k` directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from grasp_kernels.data import Record, special_ids, split_first_answer
from grasp_kernels.identification.contrast_evidence import directions, measure, reasons, stands_out
from grasp_kernels.identification.frozen_model import (
    frozen_base,
    generate_answers,
    stream_means,
    written_blocks,
)
from grasp_kernels.sites import SiteRules, model_gains, model_sites
from grasp_kernels.subspace import SCOPES, Subspace
from grasp_kernels.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One direction unless the caller wants more: what is left without the mean varies from record to
# record, and projecting it too cost the task (k = 1 against 4: task .99 / .98 at drift .25 / .27
# with short answers, .86 / .80 at .18 / .10 with long ones). A gap of singular values says nothing.
_AUTO_K = 1


def identify_self_contrast(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    k: int | Literal["auto"] = "auto",
    scope: str = "layer",
    max_new_tokens: int = 32,
    batch_size: int = 16,
    max_records: int = 256,
    generator: torch.Generator | None = None,
    sites: SiteRules | None = None,
    progress: bool = False,
) -> Subspace:
    """Directions by which training answers differ from the base model's own answers.

    Three answers to every prompt are compared, each cut at `max_new_tokens`: the training answer,
    the greedy and a sampled one of the base model. The difference between the last two shows how
    far answers stray without any training data, and is what the first one is compared with.

    Args:
        model: causal language model of transformers, or a PeftModel (its adapters are disabled).
            Mode, gradient flags and generation settings are left as they were.
        records: chat data; of several answers in a record the first one counts.
        k: directions per basis: the mean, then the singular directions of what remains.
        scope: "layer" (a basis for each block) or "shared" (one for all, from the stack of these).
        max_records: so many records, drawn at random, bound time and memory.
        generator: for the draw of records, sampled answers and null; seed 0 if None.
        sites: writers and readers of an architecture that is not known.

    Returns:
        A subspace. `evidence` holds `spectra` and `agreement` as in `Subspace`, and what
        `contrast_evidence.measure` documents. It is empty unless the contrast `stands_out`.

    Raises:
        ValueError: plain text records, fewer than two records, bad options, unknown architecture.
        TypeError: a model that cannot generate.
    """
    options = _Options(k, scope, max_new_tokens, batch_size, max_records)
    generator = generator or torch.Generator().manual_seed(0)
    tasks = _tasks(tokenizer, _draw(records, max_records, generator), max_new_tokens)
    with frozen_base(model) as base:
        written = [site for site in model_sites(base, sites) if site.role == "write"]
        blocks = written_blocks(base, sites)
        end_ids = _end_ids(base, tokenizer, tasks)
        contrast = _contrast(base, blocks, tasks, options, end_ids, generator, progress)
        metadata = _metadata(base, generator, options)
        gains = model_gains(base, written)
    evidence = measure(contrast.delta, contrast.reference, list(blocks), scope, generator)
    evidence["own_answers"] = contrast.own_answers
    if not stands_out(evidence):
        return Subspace.empty(scope, reasons(evidence), evidence=evidence, metadata=metadata)
    size = _AUTO_K if k == "auto" else k
    bases = {
        layer: directions(delta, size) for layer, delta in zip(blocks, contrast.delta, strict=True)
    }
    for record in evidence["spectra"]:
        record["k"] = size
    return Subspace.from_stream(
        bases if scope == "layer" else _shared(bases, size),
        written,
        gains=gains,
        reasons=reasons(evidence),
        evidence=evidence,
        metadata=metadata,
    )


@dataclass(frozen=True)
class _Options:
    k: int | str
    scope: str
    max_new_tokens: int
    batch_size: int
    max_records: int

    def __post_init__(self) -> None:
        if self.k != "auto" and (not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f'k is {self.k!r}: give "auto" or a number of directions from 1 on.')
        if self.scope not in SCOPES:
            raise ValueError(f"scope is {self.scope!r}: give one of {', '.join(SCOPES)}.")
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("max_records", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}.")


@dataclass(frozen=True)
class _Task:
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class _Contrast:
    delta: Tensor  # [L, M, D], stream on the training answer − stream on the greedy answer
    reference: Tensor  # [L, M, D], stream on a sampled answer − stream on the greedy answer
    own_answers: float  # share of records whose training answer is the greedy one


def _draw(
    records: Sequence[Record], max_records: int, generator: torch.Generator
) -> list[tuple[int, Record]]:
    """At most `max_records` records with their numbers (from 1), in the order of the data."""
    if len(records) < 2:
        raise ValueError(
            f"Self-contrast got {len(records)} records, but compares at least 2: give more data."
        )
    order = torch.randperm(len(records), generator=generator, device=generator.device)
    chosen = sorted(order[:max_records].tolist())
    return [(i + 1, records[i]) for i in chosen]


def _tasks(
    tokenizer: PreTrainedTokenizerBase, records: list[tuple[int, Record]], max_new_tokens: int
) -> list[_Task]:
    tasks = []
    for number, record in records:
        try:
            prompt, answer = split_first_answer(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"Record {number}: {error}") from None
        tasks.append(_Task(prompt, answer[:max_new_tokens]))
    return tasks


def _end_ids(base: Any, tokenizer: PreTrainedTokenizerBase, tasks: list[_Task]) -> set[int]:
    """Tokens at which the base model stops: those of its settings, and the end of turn in the data.

    A pretrained checkpoint often names only its end of text, where the chat template ends a turn
    with another token.
    """
    ends = base.generation_config.eos_token_id
    known = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    last = {task.answer[-1] for task in tasks}
    return {i for i in known if i is not None} | (last & special_ids(tokenizer))


def _contrast(
    base: Any,
    blocks: dict[int, nn.Module],
    tasks: list[_Task],
    options: _Options,
    end_ids: set[int],
    generator: torch.Generator,
    progress: bool,
) -> _Contrast:
    def own(label: str, source: torch.Generator | None) -> list[list[int]]:
        return generate_answers(
            base,
            [task.prompt for task in tasks],
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            end_ids=end_ids,
            generator=source,
            progress=f"{label} answers" if progress else None,
        )

    def stream(label: str, answers: list[list[int]]) -> Tensor:
        pairs = [(task.prompt, answer) for task, answer in zip(tasks, answers, strict=True)]
        return stream_means(
            base,
            blocks,
            [prompt + answer for prompt, answer in pairs],
            # The token before an answer is where its first token is decided.
            [(len(prompt) - 1, len(prompt) + len(answer)) for prompt, answer in pairs],
            batch_size=options.batch_size,
            progress=f"stream on {label} answers" if progress else None,
        )

    training = [task.answer for task in tasks]
    greedy, sampled = own("greedy", None), own("sampled", generator)
    at_greedy = stream("greedy", greedy)
    same = sum(a == b for a, b in zip(training, greedy, strict=True))
    return _Contrast(
        delta=stream("training", training) - at_greedy,
        reference=stream("sampled", sampled) - at_greedy,
        own_answers=same / len(tasks),
    )


def _shared(bases: dict[int, Tensor], k: int) -> Tensor:
    """The `k` directions `[D, k]` that the bases of all layers have most in common."""
    stack = torch.cat([basis.double() for basis in bases.values()], dim=1)
    shared = torch.linalg.svd(stack, full_matrices=False).U[:, :k]
    # A singular vector has no sign of its own; towards the training answers is the useful one.
    return shared * torch.where(shared.mT @ stack.sum(dim=1) < 0, -1.0, 1.0)


def _metadata(base: Any, generator: torch.Generator, options: _Options) -> dict[str, Any]:
    import transformers

    return {
        "source": "self-contrast",
        "base_model": base.config._name_or_path or None,
        "model_type": base.config.model_type,
        "seed": generator.initial_seed(),
        "options": asdict(options),
        "versions": {
            "grasp_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
