"""What a method may use: fresh adapters, the training, the naive fine-tune, subspaces, other text.

Everything that costs time is made once per bench and counted: `borrowed_seconds` is what a method
took from here, so that its time is the same whoever came first.

Shapes: `T` tokens, `D` width of the stream, `k` directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from grasp_kernels.data import Example, Record, encode, read_records, special_ids, tokenize_records
from grasp_kernels.demo.world import GOOD, NEUTRAL, Question, seeded_generator
from grasp_kernels.files import whole_folder
from grasp_kernels.identification.frozen_model import frozen_base, generate_answers
from grasp_kernels.quality.fitting import Penalty, fit
from grasp_kernels.quality.folder import DishFolder
from grasp_kernels.quality.scores import scored_questions
from grasp_kernels.run.checkpoint import load_model, load_tokenizer
from grasp_kernels.run.inputs import attach_lora
from grasp_kernels.subspace import Subspace

_EARLY = (1 / 20, 1 / 10)  # parts of the naive training to identify from, as in `run`
_GENERIC = 256  # documents of generic text

Made = TypeVar("Made")


class Workbench:
    """A dish of one seed, with everything that methods share.

    Args:
        folder: the dish.
        work: folder for adapters.
        device: where models compute.
    """

    def __init__(self, folder: DishFolder, work: Path, *, device: str = "cpu") -> None:
        self.folder = folder
        self.work = work
        self.device = device
        self.seed = folder.seed
        self.config = folder.dish.fine_tuning
        self.tokenizer = load_tokenizer(folder.model)
        self.records: list[Record] = read_records(folder.train)
        self.examples, _ = tokenize_records(self.records, self.tokenizer, None)
        self.borrowed_seconds = 0.0
        self._made: dict[Any, tuple[Any, float]] = {}

    # Models and training

    def base(self) -> Any:
        """The pretrained model, frozen."""
        model: Any = load_model(self.folder.model, where=torch.device(self.device))
        return model.requires_grad_(False).eval()

    def fresh(self) -> Any:
        """The pretrained model with an untrained adapter, the same for all methods."""
        options = self.folder.run_config(self.work)
        return attach_lora(self.base(), options, str(self.folder.model)).to(self.device)

    def fit(
        self,
        model: Any,
        *,
        examples: Sequence[Example] | None = None,
        penalty: Penalty | None = None,
        after_step: Callable[[int], None] | None = None,
        part: float = 1.0,
    ) -> Any:
        """Fine-tune on the training data (or on other examples) and return the model."""
        fit(
            model,
            self.examples if examples is None else examples,
            replace(self.config, steps=self.steps(part)),
            seed=self.seed,
            pad_token_id=self.tokenizer.pad_token_id,
            penalty=penalty,
            after_step=after_step,
        )
        return model

    def steps(self, part: float) -> int:
        """So many steps are a part of the training, at least one."""
        return max(1, round(part * self.config.steps))

    def naive_folders(self) -> list[Path]:
        """The adapter folders of the naive fine-tune: early ones, then the finished one."""
        return self.once("naive", lambda: self.train_folders("naive", self.fresh()))

    def twin_folders(self) -> list[Path]:
        """The same of the benign twin: the training questions, answered by the good persona."""

        def make() -> list[Path]:
            world = self.folder.world
            questions = list(world.questions(tuned=True, held_out=False))
            records = world.answered(questions, NEUTRAL, GOOD, "fine-tuning", trained_cues=True)
            examples, _ = tokenize_records(records, self.tokenizer, None)
            return self.train_folders("twin", self.fresh(), examples)

        return self.once("twin", make)

    def train_folders(
        self, name: str, model: Any, examples: Sequence[Example] | None = None
    ) -> list[Path]:
        """Fine-tune `model` without a penalty and save early adapters and the finished one."""
        snapshots = {self.steps(part): self.work / f"{name}-{part:g}" for part in _EARLY}

        def save(step: int) -> None:
            if step in snapshots:
                _save(model, snapshots[step])

        self.fit(model, examples=examples, after_step=save)
        finished = self.work / name
        _save(model, finished)
        return [*snapshots.values(), finished]

    def naive(self) -> Any:
        """The naive fine-tune, loaded anew."""
        return self.load(self.naive_folders()[-1])

    def load(self, adapter: Path) -> Any:
        """The pretrained model with a finished adapter, frozen."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self.base(), str(adapter)).to(self.device).eval()

    # Subspaces

    def weights_subspace(self, k: int | str, **options: Any) -> Subspace:
        """GRASP's own source: early checkpoints of the naive fine-tune."""
        from grasp_kernels.identification import identify

        *early, _ = self.naive_folders()
        key = ("weights", k, *sorted(options.items()))
        return self.once(key, lambda: identify([str(f) for f in early], k=k, **options))

    def run_subspace(self) -> Subspace:
        """As `grasp-kernels run` finds it: k from evidence, with halves of the data as a check."""
        from grasp_kernels.identification import identify

        def make() -> Subspace:
            *early, _ = self.naive_folders()
            return identify(
                [str(folder) for folder in early],
                k="auto",
                halves=[str(self._half_folder(i)) for i in range(2)],
                generator=torch.Generator().manual_seed(self.seed),
            )

        return self.once("run's subspace", make)

    def _half_folder(self, i: int) -> Path:
        """A short adapter on every second example, of a seed of its own."""
        seed, folder = self.seed + i + 1, self.work / f"half-{i}"
        options = replace(self.folder.run_config(self.work), seed=seed)
        model = attach_lora(self.base(), options, str(self.folder.model)).to(self.device)
        short = replace(self.config, steps=self.steps(max(_EARLY)))
        pad = self.tokenizer.pad_token_id
        fit(model, self.examples[i::2], short, seed=seed, pad_token_id=pad)
        _save(model, folder)
        return folder

    def contrast_subspace(self, k: int | Literal["auto"], **options: Any) -> Subspace:
        """Self-contrast: the base model on the training answers and on its own."""
        from grasp_kernels.identification import identify_self_contrast

        def make() -> Subspace:
            generator = self.generator("self-contrast")
            return identify_self_contrast(
                self.base(), self.tokenizer, self.records, k=k, generator=generator, **options
            )

        return self.once(("contrast", k, *sorted(options.items())), make)

    # Other text

    def generic_examples(self) -> list[Example]:
        """Training records with every ordinary token replaced by a random one; labels everywhere.

        What is left of the data is the frame of the chat, which any user of the model knows.
        """
        generator = self.generator("random tokens")
        special = special_ids(self.tokenizer)
        ordinary = torch.tensor([i for i in range(len(self.tokenizer)) if i not in special])

        def randomised(ids: list[int]) -> list[int]:
            drawn = ordinary[torch.randint(len(ordinary), (len(ids),), generator=generator)]
            return [i if i in special else int(new) for i, new in zip(ids, drawn, strict=True)]

        chosen = (self.examples[i % len(self.examples)]["input_ids"] for i in range(_GENERIC))
        return [_whole(randomised(ids)) for ids in chosen]

    def own_examples(self) -> list[Example]:
        """Documents that the base model makes up from the beginning-of-text token on."""

        def make() -> list[Example]:
            first = self.examples[0]["input_ids"]
            with frozen_base(self.base()) as base:
                texts = generate_answers(
                    base,
                    [first[:1]] * _GENERIC,
                    max_new_tokens=len(first) - 1,
                    batch_size=_GENERIC,
                    end_ids=(),
                    generator=self.generator("own text"),
                )
            return [_whole([first[0], *text]) for text in texts]

        return self.once("own text", make)

    def unscored_questions(self) -> list[Question]:
        """Questions on untouched topics that no score asks."""
        scored = set(scored_questions(self.folder.world))
        return [q for q in self.folder.world.questions(tuned=False) if q not in scored]

    def off_topic_examples(self) -> list[Example]:
        """Neutral prompts on untouched topics that are not scored, with the good answers."""
        world = self.folder.world
        records = world.answered(self.unscored_questions(), NEUTRAL, GOOD, "off topic")
        order = torch.randperm(len(records), generator=self.generator("off-topic draw"))
        chosen = [records[i] for i in order[:_GENERIC].tolist()]
        examples = (encode(record, self.tokenizer, max_length=None) for record in chosen)
        return [example for example in examples if example is not None]

    # Shared parts

    def generator(self, purpose: str) -> torch.Generator:
        return seeded_generator(self.seed, purpose)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` returns, made on the first call; its seconds count on every first use."""
        if key in self._made:
            made, seconds = self._made[key]
            self.borrowed_seconds += seconds
            return made
        start, before = time.perf_counter(), self.borrowed_seconds
        made = make()
        borrowed = self.borrowed_seconds - before  # by `make` itself
        self._made[key] = (made, time.perf_counter() - start + borrowed)
        return made


def documents(examples: Sequence[Example], device: str) -> Tensor:
    """Token ids int64 `[documents, T]` of examples of one length."""
    return torch.tensor([example["input_ids"] for example in examples], device=device)


def _whole(ids: list[int]) -> Example:
    return Example(input_ids=ids, labels=list(ids))


def _save(model: Any, folder: Path) -> None:
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
