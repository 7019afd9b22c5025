"""Base model and adapter -> Diagnosis.

Shapes: `D` residual width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grasp_kernels.data import Record
from grasp_kernels.diagnosis.examination import Examination, Options
from grasp_kernels.diagnosis.inputs import Source, find_neutral, find_tasks, find_tokenizer
from grasp_kernels.diagnosis.pair import open_pair
from grasp_kernels.diagnosis.verdict import judge
from grasp_kernels.models.architectures import SiteRules
from grasp_kernels.models.checkpoint import find_checkpoint
from grasp_kernels.version import __version__


@dataclass(frozen=True)
class Diagnosis:
    """What an adapter learned unasked, as far as can be seen; `numbers` is JSON-able and whole.

    Attributes:
        verdict: "found", "weak" or "nothing", of the adapter's own answers to neutral prompts, see
            `grasp_kernels.effect.verdict`.
        reasons: what it rests on, in sentences.
        numbers: directions (movement, tokens, examples, steering, removal), effect on neutral
            prompts, options and versions.
    """

    verdict: str
    reasons: tuple[str, ...]
    numbers: dict[str, Any]

    def text(self) -> str:
        """The whole diagnosis in Markdown."""
        from grasp_kernels.diagnosis.report import diagnosis_text

        return diagnosis_text(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": list(self.reasons), **self.numbers}

    def plot(self, path: str | PathLike[str]) -> None:
        """Save a PNG: movement of neutral prompts, steering, removal."""
        from grasp_kernels.diagnosis.figures import draw

        draw(self.to_json(), path)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write diagnosis.md, diagnosis.json and diagnosis.png; the folder appears whole.

        Raises:
            FileExistsError: there is something already.
        """
        from grasp_kernels.diagnosis.report import save

        save(self, Path(folder))


def diagnose(
    model: nn.Module | Source,
    adapter: Source | None = None,
    *,
    tokenizer: Any = None,
    records: Source | Sequence[Record] | None = None,
    neutral: Source | Sequence[Sequence[int]] | None = None,
    sites: SiteRules | None = None,
    dtype: str = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
    options: Options | None = None,
) -> Diagnosis:
    """Did an adapter learn something besides its task? Without labels, without retraining.

    Args:
        model: base model as checkpoint folder, hub name or module; or a PeftModel, whose active
            adapter is looked at. Modules are left as they were.
        adapter: adapter folder; None where `model` is a PeftModel.
        tokenizer: that of the model, where it is no folder.
        records: training data, a file or records. Without them there are no examples, and the
            effect on neutral prompts cannot be set against that on the training data.
        neutral: prompts that have nothing to do with the training data, a file (see
            `grasp-kernels run --neutral`) or token ids; everyday questions if None.
        sites: writers of an architecture that is not known.
        dtype: of the weights, where the model is loaded here.
        generator: for random directions and signs; seed 0 if None.
        options: sizes, see `Options`.

    Raises:
        ValueError, TypeError, FileNotFoundError: one sentence on what is wrong.
    """
    chosen = options or Options()
    if not isinstance(model, nn.Module):
        model = find_checkpoint(str(model))
    generator = generator or torch.Generator().manual_seed(0)
    reader = find_tokenizer(model, tokenizer)
    prompts = find_neutral(neutral, reader)
    tasks = find_tasks(
        records,
        reader,
        most=chosen.max_records,
        max_answer=chosen.max_answer_tokens,
        max_prompt=chosen.max_prompt_tokens,
    )
    with open_pair(model, adapter, sites=sites, dtype=dtype) as pair:
        work = Examination(pair, reader, prompts, tasks, chosen, generator, progress)
        numbers = {
            "adapter": str(adapter or pair.model.active_adapters[0]),
            "model": {
                "type": pair.base.config.model_type,
                "layers": len(pair.layers),
                "width": work.neutral.delta.shape[2],
            },
            "neutral_prompts": len(prompts),
            "records": len(tasks),
            **work.numbers(),
            "options": asdict(chosen),
            "seed": generator.initial_seed(),
            "versions": {"grasp_kernels": __version__, "torch": torch.__version__},
        }
    verdict, reasons = judge(numbers)
    return Diagnosis(verdict, tuple(reasons), json.loads(json.dumps(numbers, allow_nan=False)))
