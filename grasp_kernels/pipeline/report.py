"""The end of a run: both adapters -> their answers, numbers, a chart, and a text in plain words.

report.json holds every number. `training_chart` and report_text.py show numbers and measure none.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from grasp_kernels import leakage, processes
from grasp_kernels.data import Record, encode, split_first_answer
from grasp_kernels.diagnosis import Pair, adapter_numbers, base_answers, spread
from grasp_kernels.diagnosis.effect import mean_loss
from grasp_kernels.files import write_json, write_text
from grasp_kernels.models.checkpoint import load_model
from grasp_kernels.pages.chart import Line, line_chart
from grasp_kernels.pages.page import page
from grasp_kernels.pipeline.config import RunConfig
from grasp_kernels.pipeline.folder import LOG_NAME, RunFolder
from grasp_kernels.pipeline.inputs import ANSWER_TOKENS, Inputs
from grasp_kernels.progress import bar
from grasp_kernels.subspace import Subspace

_SHOWN_TOKENS = 6
_PACKAGES = ("grasp_kernels", "torch", "transformers", "peft")
_DESCRIBED = ("k", "notes", "metadata")  # of the subspace


@dataclass(frozen=True)
class Report:
    """Results of a run, and the paths of its files."""

    output: Path
    numbers: dict[str, Any]  # the content of report.json; the divergence is in nats a token

    @property
    def verdict(self) -> str:
        """Verdict on the retrained adapter: "found", "weak" or "nothing", see `Diagnosis`."""
        return list(self.numbers["adapters"].values())[-1]["answers"]["verdict"]

    @property
    def naive(self) -> Path:
        """Folder of the naive adapter."""
        return self.output / "naive"

    @property
    def retrained(self) -> Path:
        """Folder of the retrained adapter."""
        return self.output / "retrained"

    @property
    def subspace(self) -> Path:
        """Path of the subspace; the file exists only after a run with `project_gradient`."""
        return self.output / "subspace.safetensors"

    @property
    def chats(self) -> Path:
        """Path of the base model's chats; the file exists only if `kl_coef` is above 0."""
        return self.output / "chats.safetensors"

    @property
    def text(self) -> Path:
        """Path of the report in Markdown."""
        return self.output / "report.md"

    @property
    def page(self) -> Path:
        """Path of the report as one page for a browser, which loads nothing."""
        return self.output / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report.json; the other files of the run are in the same folder."""
        path = Path(path)
        return cls(path.parent, json.loads(path.read_text(encoding="utf-8")))


def write_report(
    config: RunConfig, folder: RunFolder, inputs: Inputs, subspace: Subspace | None
) -> None:
    """Measure both adapters; write the figure, report.md, report.html and, last, report.json.

    Args:
        subspace: the gradient of the retraining was projected off it; None: no projection.
    """
    from grasp_kernels.pipeline.report_text import report_text

    numbers = _numbers(config, folder, inputs, subspace)  # in all processes, for a split model
    text, drawn = report_text(numbers), training_chart(numbers["adapters"])

    def write() -> None:
        write_text(folder.training_chart, drawn)
        write_text(folder.report_text, text)
        write_text(folder.report_page, page(text, {folder.training_chart.name: drawn}))
        write_json(folder.report, numbers)

    processes.from_first(write)


def _numbers(
    config: RunConfig, folder: RunFolder, inputs: Inputs, subspace: Subspace | None
) -> dict[str, Any]:
    folders = {"naive": folder.naive, "retrained": folder.retrained}
    adapters = {
        name: {"curve": _curve(path), "leakage": leakage(path, subspace) if subspace else {}}
        for name, path in folders.items()
    }
    model = load_model(inputs.checkpoint, config.dtype)
    text_config = model.config.get_text_config()  # of a model for images and text, its text part
    width = text_config.hidden_size
    numbers = {
        "versions": {"python": platform.python_version()}
        | {name: import_module(name).__version__ for name in _PACKAGES},
        "config": asdict(config),
        "model": {
            "type": inputs.model_type,
            "layers": text_config.num_hidden_layers,
            "width": width,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "data": {
            "records": len(inputs.records),
            "trained_on": len(inputs.train),
            "held_out": len(inputs.held_out),
            "dropped": inputs.n_dropped,
            "cut": inputs.n_cut,
        },
        "steps": inputs.steps,
        "subspace": subspace and {name: getattr(subspace, name) for name in _DESCRIBED},
        "adapters": adapters,
    }
    _measure_models(model, folders, inputs, config, numbers)
    return json.loads(json.dumps(numbers))


def _curve(adapter: Path) -> dict[str, list[float]]:
    entries = json.loads((adapter / LOG_NAME).read_text(encoding="utf-8"))
    # The loss on the training data, without the divergence.
    losses = [entry["loss"] - entry.get("kl", 0.0) for entry in entries]
    return {"step": [entry["step"] for entry in entries], "loss": losses}


_COLOURS = {"naive": "#d62728", "retrained": "#1f77b4"}


def training_chart(adapters: dict[str, Any]) -> str:
    """Draw the training losses as SVG: each step pale, the running mean bold."""
    lines = []
    for name, adapter in adapters.items():
        steps, losses = adapter["curve"]["step"], adapter["curve"]["loss"]
        lines += [
            Line(name, _COLOURS[name], steps, losses, is_pale=True),
            Line(name, _COLOURS[name], steps, smoothed(losses)),
        ]
    return line_chart(lines, "optimizer step", "training loss")


def smoothed(values: list[float], parts: int = 20) -> list[float]:
    """Average the last part (a 20th) of the training up to each step."""
    width = max(1, len(values) // parts)
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _measure_models(
    model: Any, folders: dict[str, Path], inputs: Inputs, config: RunConfig, numbers: dict[str, Any]
) -> None:
    """Add the numbers that need a forward pass. Stock peft loads the adapters."""
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, str(folders["naive"]), adapter_name="naive")
    peft_model.load_adapter(str(folders["retrained"]), adapter_name="retrained")
    peft_model.eval()
    adapters = numbers["adapters"]
    if inputs.held_out:
        padded = {
            "batch_size": config.per_device_train_batch_size,
            "pad_token_id": inputs.pad_token_id,
        }
        with peft_model.disable_adapter():
            numbers["base_held_out_loss"] = mean_loss(peft_model, inputs.held_out, **padded)
        for name in bar(folders, desc="held-out loss", unit="adapter"):
            peft_model.set_adapter(name)
            adapters[name]["held_out_loss"] = mean_loss(peft_model, inputs.held_out, **padded)
    pair = Pair(peft_model)
    prompts = {"unrelated": inputs.neutral, "training": _training_prompts(inputs, config)}
    size: dict[str, Any] = {
        "batch_size": config.per_device_train_batch_size,
        "n_tokens": ANSWER_TOKENS,
    }
    said = base_answers(pair, inputs.tokenizer, prompts, **size)
    for name in bar(folders, desc="answers of the adapters", unit="adapter"):
        peft_model.set_adapter(name)
        adapters[name] |= adapter_numbers(
            pair, inputs.tokenizer, said, **size, n_listed=_SHOWN_TOKENS
        )


def _training_prompts(inputs: Inputs, config: RunConfig) -> list[list[int]]:
    """Return a few records up to their first answer; plain text as a whole."""
    longest = config.max_length
    if inputs.positions is not None:
        longest = min(longest, inputs.positions - ANSWER_TOKENS)
    chosen = [inputs.records[i] for i in spread(len(inputs.records))]
    return [ids for r in chosen if (ids := _prompt(r, inputs)[:longest])]


def _prompt(record: Record, inputs: Inputs) -> list[int]:
    if "text" not in record:
        return split_first_answer(record, inputs.tokenizer)[0]
    examples = encode(record, inputs.tokenizer, max_length=None)
    return examples[0]["input_ids"] if examples else []
