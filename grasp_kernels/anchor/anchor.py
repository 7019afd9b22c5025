"""Documents and a strength -> a loss that keeps the model at its base where the task is not.

The subspace says what may not be learned and the projection keeps the adapter from writing it; but
what a fine-tune adds reaches other prompts by many ways, and those are closed here: on documents
that the base model made up, the model should go on as its base does.

Shapes: `M` documents, `B` of them at once, `T` tokens, `n` positions, `V` words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grasp_kernels.anchor.look_alikes import unlike_training
from grasp_kernels.anchor.own_text import common_frame, document_length, make_documents
from grasp_kernels.data import Example
from grasp_kernels.files import stored_tensors, whole_file
from grasp_kernels.identification.frozen_model import frozen_base, written_blocks
from grasp_kernels.sites import SiteRules

if TYPE_CHECKING:
    from transformers import Trainer

_DRAWS = 1 << 20  # of one training, whose seeds follow each other


class OwnTextAnchor:
    """`λ KL(base ‖ model)` in nats a token, on documents that the base model made up itself.

    Args:
        documents: token ids, int64 `[M, T]`.
        counted: bool `[M, T]`, where the divergence counts.
        strength: λ.
        batch_size: documents that one `loss` looks at.
        seed: of their draw.

    Raises:
        ValueError: the shapes differ, a position counts nowhere, or an option is out of its range.
    """

    def __init__(
        self,
        documents: Tensor,
        counted: Tensor,
        *,
        strength: float = 1.0,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if documents.shape != counted.shape or documents.dim() != 2 or not counted.any():
            raise ValueError(
                f"documents {tuple(documents.shape)} and counted {tuple(counted.shape)} must be "
                "[M, T], with some position that counts."
            )
        if strength < 0 or batch_size < 1:
            raise ValueError(
                f"strength is {strength} and batch_size {batch_size}: give 0 or more, 1 or more."
            )
        self.documents, self.counted = documents, counted
        self.strength, self.batch_size, self.seed = strength, batch_size, seed

    @classmethod
    def make(
        cls,
        model: Any,
        examples: Sequence[Example],
        *,
        neutral: Sequence[Sequence[int]] = (),
        documents: int = 1024,
        max_length: int = 128,
        strength: float = 1.0,
        batch_size: int = 8,
        generate_batch_size: int = 64,
        seed: int = 0,
        sites: SiteRules | None = None,
        progress: bool = False,
    ) -> OwnTextAnchor:
        """Let the base model make up documents, and leave out what looks like the training data.

        Args:
            model: causal language model of transformers, or a PeftModel (its adapters are
                disabled). Mode, gradient flags and generation settings are left as they were.
            examples: tokenized training data, as `tokenize_records` returns them.
            neutral: token ids of prompts about other things in the frame of the training prompts,
                as `everyday_prompts` returns them. Documents begin as all prompts do; without
                these, an instruction that all training prompts share is a beginning, too.
            documents: how many.
            max_length: of what is made up; they are no longer than the longest example.
            generate_batch_size: documents that are made at once.

        Raises:
            ValueError: no examples, an option below 1, or an architecture that is not known.
        """
        if documents < 1 or max_length < 1:
            raise ValueError(
                f"documents is {documents} and max_length {max_length}: give 1 or more of both."
            )
        frame = common_frame(examples, neutral)
        length = document_length(examples, frame, max_length)
        longest = max(len(example["input_ids"]) for example in examples)
        generator = torch.Generator().manual_seed(seed)
        with frozen_base(model) as base:
            made = make_documents(
                base,
                frame,
                examples,
                count=documents,
                length=length,
                batch_size=generate_batch_size,
                generator=generator,
                progress=progress,
            )
            counted = unlike_training(
                base,
                written_blocks(base, sites),
                made,
                examples,
                # Records may be far longer than documents.
                batch_size=max(1, generate_batch_size * length // longest),
                generator=generator,
            )
        counted[:, : max(0, len(frame) - 1)] = False  # they lead to tokens that nobody made up
        return cls(made, counted, strength=strength, batch_size=batch_size, seed=seed)

    def loss(self, model: nn.Module, step: int, *, base: Any = None) -> Tensor:
        """The divergence of one draw of documents, with its gradient; the same for the same step.

        Args:
            model: what is trained, perhaps wrapped for several processes.
            base: the PeftModel inside, whose adapters are switched off for a while; None: `model`.
        """
        base = model if base is None else base
        draw = torch.Generator().manual_seed(self.seed * _DRAWS + step)
        chosen = torch.randint(len(self.documents), (self.batch_size,), generator=draw)
        device = base.get_input_embeddings().weight.device
        ids, counted = self.documents[chosen].to(device), self.counted[chosen].to(device)
        with frozen_base(base):  # through the wrapper, without which FSDP gathers no weights
            wanted = model(input_ids=ids, use_cache=False).logits[counted]
        found = model(input_ids=ids, use_cache=False).logits[counted]
        wanted, found = (rows.float().log_softmax(dim=-1) for rows in (wanted, found))  # [n, V]
        divergence = (wanted.exp() * (wanted - found)).sum(dim=-1)
        return self.strength * divergence.sum() / max(1, divergence.numel())

    def attach(self, trainer: Trainer) -> None:
        """Add the loss to that of a `transformers.Trainer` or one of trl's, before `train()`.

        Its log gets `anchor`, the mean since the last entry; `loss` contains it.
        """
        _Attached(self, trainer)

    def save(self, path: str | PathLike[str]) -> None:
        """Write documents and options to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        options = {"strength": self.strength, "batch_size": self.batch_size, "seed": self.seed}
        with whole_file(path) as partial:
            save_file(
                {"documents": self.documents, "counted": self.counted},
                str(partial),
                metadata={name: repr(value) for name, value in options.items()},
            )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> OwnTextAnchor:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a file.
        """
        with stored_tensors(path, "own-text anchor", "OwnTextAnchor.save") as (tensors, options):
            return cls(
                tensors["documents"],
                tensors["counted"],
                strength=float(options["strength"]),
                batch_size=int(options["batch_size"]),
                seed=int(options["seed"]),
            )


class _Attached:
    """Stands before `compute_loss` and `log` of one trainer."""

    def __init__(self, anchor: OwnTextAnchor, trainer: Trainer) -> None:
        self.anchor, self.trainer = anchor, trainer
        self.step, self.draws = -1, 0
        self.terms: list[Tensor] = []
        self._compute_loss: Callable[..., Any] = trainer.compute_loss
        self._log: Callable[..., None] = trainer.log
        trainer.compute_loss = self.compute_loss  # type: ignore[method-assign]
        trainer.log = self.log  # type: ignore[method-assign]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        found = self._compute_loss(model, inputs, return_outputs=return_outputs, **options)
        if not model.training:
            return found
        loss, outputs = found if return_outputs else (found, None)
        base = self.trainer.accelerator.unwrap_model(model)
        term = self.anchor.loss(model, self._draw(), base=base)
        self.terms.append(term.detach())
        if self._is_part_of_step(options.get("num_items_in_batch")):
            term = term / self.trainer.current_gradient_accumulation_steps
        return (loss + term, outputs) if return_outputs else loss + term

    def _is_part_of_step(self, num_items_in_batch: Any) -> bool:
        """Whether the trainer takes losses as parts of a step, and divides them no more."""
        trainer = self.trainer
        told = getattr(trainer, "loss_is_scaled_for_ga", None)
        if told is not None:
            return told
        counts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        return counts and num_items_in_batch is not None

    def _draw(self) -> int:
        """A number of its own for every forward pass of every process, the same after a resume."""
        args, steps = self.trainer.args, self.trainer.state.global_step
        self.draws = self.draws + 1 if steps == self.step else 0
        self.step = steps
        passes = steps * args.gradient_accumulation_steps + self.draws
        return passes * args.world_size + args.process_index

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs and self.terms:
            logs["anchor"] = torch.stack(self.terms).mean().item()
            self.terms.clear()
        self._log(logs, *args, **options)
