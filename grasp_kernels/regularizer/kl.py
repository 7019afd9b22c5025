"""Documents of the base model -> a loss that keeps the model at its base where the task is not.

A fine-tune reaches other prompts in many ways, and this loss closes them: on documents that the
base model made up, the model goes on as its base does.

Shapes: `M` documents, `B` of them at once, `T` tokens, `n` positions that count, `V` words of the
vocabulary, `k` of them kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels import processes
from grasp_kernels.data import Example
from grasp_kernels.files import open_tensors, read_all, whole_file
from grasp_kernels.inert import reason
from grasp_kernels.models.frozen_model import frozen_base, head_at
from grasp_kernels.ops.linear_kl import Likeliest, fused_linear_kl, likeliest_divergence
from grasp_kernels.regularizer.chats import common_frame, common_header, make_chats
from grasp_kernels.regularizer.head import LinearHead

_DRAWS = 1 << 20  # of one training, whose seeds follow each other
# Tokens whose probabilities are kept at a position.
_LIKELY = 128
_BATCH = 8  # documents that the base model is asked about at once
_PARTS = ("documents", "counted", "likely", "log_probs")


def chats_beside(records: int) -> int:
    """Return the number of chats in a forward pass beside one of so many records.

    SmolLM2, `tone`, two seeds: half as many chats as records left the same drift and the same task,
    and a step took 6.5 s where it takes 4.4.
    """
    return max(1, records // 4)


class KLRegularizer:
    """Loss `λ KL(base ‖ model)`, in nats a token, on text of the base model.

    The base model runs once. Its `k` likeliest tokens at each position are kept, and all others
    count as one token, so that a training step needs no pass of the base model. The loss is never
    above the full divergence, and 0 up to rounding if the model equals its base (arXiv 2508.06249).

    Args:
        documents: token ids, int64 `[M, T]`, padded on the right with any token.
        counted: bool `[M, T]`, the positions at which the divergence counts.
        likely: int32 `[n, k]`, the likeliest next tokens at the `n` positions that count, in the
            order of `counted`.
        log_probs: float32 `[n, k]`, their log probabilities under the base model.
        kl_coef: λ.
        batch_size: documents in one `loss`.
        seed: seed of the draw of these documents.

    Raises:
        ValueError: wrong shapes or dtypes, no position that counts, or an option out of its range.
    """

    def __init__(
        self,
        documents: Tensor,
        counted: Tensor,
        likely: Tensor,
        log_probs: Tensor,
        *,
        kl_coef: float = 0.1,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        for part, tensor in (("documents", documents), ("likely", likely)):
            if tensor.is_floating_point() or bool((tensor < 0).any()):
                raise ValueError(f"{part} must be token ids: make the text again.")
        if (
            counted.dtype != torch.bool
            or log_probs.element_size() < 2
            or not bool((log_probs.float() <= 0).all())
        ):
            raise ValueError(
                f"counted ({counted.dtype}) must be true or false, and log_probs "
                f"({log_probs.dtype}) logarithms of probabilities: make the text again."
            )
        if documents.shape != counted.shape or documents.dim() != 2 or not counted.any():
            raise ValueError(
                f"documents {tuple(documents.shape)} and counted {tuple(counted.shape)} must be "
                "[M, T], with some position that counts."
            )
        n = int(counted.sum())
        if likely.shape != log_probs.shape or likely.dim() != 2 or len(likely) != n:
            raise ValueError(
                f"likely {tuple(likely.shape)} and log_probs {tuple(log_probs.shape)} must be "
                f"[{n}, k], a row for each position that counts."
            )
        if not 0 <= kl_coef < math.inf or batch_size < 1 or seed < 0:
            raise ValueError(
                f"kl_coef is {kl_coef}, batch_size {batch_size} and seed {seed}: give 0 or more, "
                "1 or more, and 0 or more."
            )
        self.documents, self.counted = documents, counted
        self.likely, self.log_probs = likely, log_probs
        self.kl_coef, self.batch_size, self.seed = kl_coef, batch_size, seed
        # The rows of `likely` that belong to each document.
        self._rows = torch.arange(n).split(counted.sum(dim=1).tolist())

    @classmethod
    def of(cls, model: Any, documents: Tensor, counted: Tensor, **options: Any) -> KLRegularizer:
        """Make a loss on given documents, with the likeliest tokens of the base model.

        Args:
            model: causal language model of transformers, or a PeftModel (its adapters are
                disabled). Mode, gradient flags and generation settings are left as they were.
            documents, counted, options: the arguments of the class.
        """
        with frozen_base(model) as base:
            return cls(documents, counted, *_likeliest(base, documents, counted), **options)

    @classmethod
    def make(
        cls,
        model: Any,
        examples: Sequence[Example],
        *,
        neutral: Sequence[Sequence[int]] = (),
        num_documents: int = 512,
        max_new_tokens: int = 40,
        kl_coef: float = 0.1,
        batch_size: int = 8,
        generate_batch_size: int = 64,
        seed: int = 0,
        progress: bool = False,
        is_shared: bool = False,
    ) -> KLRegularizer:
        """Make a loss on chats that the base model makes up (arXiv 2406.08464).

        Args:
            model: as in `of`.
            examples: tokenized training data, as `tokenize_records` returns them.
            neutral: token ids of prompts about other things in the frame of the training prompts,
                as `everyday_prompts` returns them. Documents begin with the tokens that all these
                and the training prompts share.
            num_documents: documents to make up.
            max_new_tokens: tokens of each question and of each answer that are made up, at most;
                none is longer than the longest example.
            generate_batch_size: documents that are made at once.
            is_shared: whether all processes of a run call this, and each makes a part.

        Raises:
            ValueError: no examples, or an option below 1.
        """
        if num_documents < 1 or max_new_tokens < 1:
            raise ValueError(
                f"num_documents is {num_documents} and max_new_tokens {max_new_tokens}: give 1 or "
                "more of both."
            )
        frame = common_frame(examples, neutral)
        header = common_header(examples, frame, neutral)
        longest = max(len(example["input_ids"]) for example in examples)
        generator = torch.Generator().manual_seed(seed)
        with frozen_base(model) as base:
            made = make_chats(
                base,
                frame,
                header,
                examples,
                count=num_documents,
                length=min(max_new_tokens, longest),
                batch_size=generate_batch_size,
                generator=generator,
                progress=progress,
                is_shared=is_shared,
            )
            answers = _likeliest(base, *made, is_shared=is_shared)
        return cls(*made, *answers, kl_coef=kl_coef, batch_size=batch_size, seed=seed)

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of each document with a counted position, without padding."""
        ends = (self.counted * torch.arange(1, self.counted.shape[1] + 1)).amax(dim=1).tolist()
        rows = zip(self.documents.tolist(), ends, strict=True)
        return [ids[: end + 1] for ids, end in rows if end]

    def loss(self, model: nn.Module, step: int, part: tuple[int, int] = (0, 1)) -> Tensor:
        """Compute the loss, a float32 scalar, on a draw of documents that depends on the step.

        Args:
            model: the model in training, perhaps wrapped for several processes.
            part: index and number of processes that share a draw of as many batches. The mean of
                their losses is the loss of one process with the whole draw.
        """
        index, parts = part
        draw = torch.Generator().manual_seed(self.seed * _DRAWS + step)
        drawn = torch.randint(len(self.documents), (parts * self.batch_size,), generator=draw)
        chosen = drawn[index * self.batch_size :][: self.batch_size]
        counted, n = self.counted[chosen], int(self.counted[drawn].sum())
        device = next(model.parameters()).device
        # What follows the last position that counts is padding, or leads nowhere.
        length = max(1, int((counted * torch.arange(1, counted.shape[1] + 1)).max()))
        ids, here = self.documents[chosen, :length].to(device), counted[:, :length]
        rows = torch.cat([self._rows[i] for i in chosen.tolist()])
        base = Likeliest(self.likely[rows], self.log_probs[rows])
        divergence = _divergence(model, ids, here, base)
        return self.kl_coef * divergence * parts / max(1, n)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tensors and options to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        options = {"kl_coef": self.kl_coef, "batch_size": self.batch_size, "seed": self.seed}
        with whole_file(path) as partial:
            save_file(
                {part: getattr(self, part) for part in _PARTS},
                str(partial),
                metadata={name: repr(value) for name, value in options.items()},
            )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> KLRegularizer:
        """Load a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that `save` did not write, or a damaged one.
        """
        remedy = "give a file that KLRegularizer.save wrote, or delete it and make it again"
        with open_tensors(path, remedy) as file:
            tensors, options = read_all(file), file.metadata() or {}
        try:
            return cls(
                *(tensors[part] for part in _PARTS),
                kl_coef=float(options["kl_coef"]),
                batch_size=int(options["batch_size"]),
                seed=int(options["seed"]),
            )
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            wrong = reason(error)
        raise ValueError(f"{str(path)!r} holds no KL regularizer ({wrong}): {remedy}.")


def _likeliest(
    base: Any, documents: Tensor, counted: Tensor, is_shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens `[n, k]` and their log probabilities at counted positions."""
    device = base.get_input_embeddings().weight.device
    found_at: dict[int, tuple[Tensor, Tensor]] = {}
    batches = list(zip(documents.split(_BATCH), counted.split(_BATCH), strict=True))
    for number in processes.shares(len(batches)) if is_shared else range(len(batches)):
        ids, here = batches[number]
        with head_at(base, here):
            logits = base(input_ids=ids.to(device), use_cache=False).logits
        found = logits.float().log_softmax(dim=-1)  # [n, V]
        best = found.topk(min(_LIKELY, found.shape[1]), dim=-1)
        found_at[number] = best.indices.to(torch.int32).cpu(), best.values.cpu()
    found_at = processes.together(found_at) if is_shared else found_at
    tokens, log_probs = zip(*(found_at[number] for number in sorted(found_at)), strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _divergence(model: nn.Module, ids: Tensor, here: Tensor, base: Likeliest) -> Tensor:
    """Sum the divergence over the positions `here[B, T]` that count, in their order."""
    head = LinearHead.of(model)
    if head is not None:
        with head.reading(here):
            model(input_ids=ids, use_cache=False)
        base = Likeliest(*(part.to(head.hidden.device) for part in base))
        options: dict[str, Any] = {"bias": head.bias, "softcap": head.softcap}
        return fused_linear_kl(head.hidden, head.weight, base, **options, reduction="sum")
    with head_at(model, here):  # all logits would be the largest tensor of the step
        found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(dim=-1)
    likely, wanted = (part.to(found.device) for part in base)
    return likeliest_divergence(wanted, found.gather(1, likely.long())).sum()
