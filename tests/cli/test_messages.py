"""What the command line says of input that cannot be used: one line that names it, and a remedy.

Nothing is written then, and nothing that was there is changed.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import grasp_kernels as gk
from grasp_kernels import RunConfig
from grasp_kernels.cli import main
from grasp_kernels.inert import reason
from grasp_kernels.models.checkpoint import load_model
from grasp_kernels.pipeline.inputs import attach_lora
from grasp_kernels.training.watch import Watch
from tests.helpers.folders import contents
from tests.helpers.models import randomise_adapter

pytest_plugins = ("tests.helpers.runs",)

RUN = "run --model model --data chat.jsonl --neutral neutral.jsonl --output out --max-steps 2"
IDENTIFY = "identify adapter --base-model model --output o.safetensors"
INSPECT = "inspect adapter --base-model model --data chat.jsonl --neutral neutral.jsonl --output o"
CHECK = "check adapter s.safetensors"
PROJECT = "project adapter s.safetensors --output o"
FOLD = "fold adapter --output o"
FOR = "check adapter --for vllm"
EXTRACT = "extract merged --base-model model --output o"
RESUME = "run --model model --data chat.jsonl --output run"
ADAPTER, MODEL = "adapter/adapter_model.safetensors", "model/model.safetensors"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def prepared(
    tiny_model_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Everything that the commands take, under one name each."""
    root = tmp_path_factory.mktemp("messages")
    shutil.copytree(tiny_model_dir, root / "model")
    shutil.copy(chat_jsonl, root / "chat.jsonl")
    (root / "neutral.jsonl").write_text('{"prompt": "what is red"}\n{"prompt": "what is blue"}\n')
    config = RunConfig(model="m", data="d", output="o", r=4)
    model = attach_lora(load_model(root / "model"), config, "model")
    randomise_adapter(model)
    model.save_pretrained(root / "adapter", save_embedding_layers=False)
    gk.identify(root / "adapter", k=1).save(root / "s.safetensors")
    model.merge_and_unload().save_pretrained(root / "merged")
    return root


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "here"))
    return tmp_path / "here"


# Of libraries and of Python, whose words say nothing to somebody at a command line.
RAW = re.compile(
    r"Traceback|Errno|os error|\b\w+Error\b|object has no attribute|object is not|NoneType|<class|"
    r"not supported between|unsupported operand|indices must be|codec can't|invalid literal|"
    r"adapter_name|sites=|SiteRules|\w=\.\.\.|takes \d+ positional|unexpected keyword"
)
NAMES = [option.name for option in fields(RunConfig) if "_" in option.name]
ARGUMENTS = re.compile(rf"(?<![\w./'\"-])({'|'.join([*NAMES, 'base_model'])})(?![\w/.'\"=])")


def refused(
    command: str | list[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    *named: str,
) -> str:
    """What the command says, which is checked: one sentence, with a remedy and one of the names."""
    before = contents(folder)
    capsys.readouterr()
    assert main(command.split() if isinstance(command, str) else command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    said = errors[0].removeprefix("error: ")
    assert said.endswith(".") and re.search(r"[:;,] .+|\(see .* -h\)", said), said
    assert any(name in said for name in named), said
    assert not RAW.search(said) and not ARGUMENTS.search(said), said
    assert contents(folder) == before
    return said


# --- files that are not what they should be


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Change] = {
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(bytes(range(255, 127, -1)) * 4),
    "cut short": cut,
    "a folder": as_folder,
    "missing": Path.unlink,
    "another JSON": lambda path: path.write_text("[1]"),
}
FILES = {
    "model/config.json": (RUN, EXTRACT),
    MODEL: (RUN, EXTRACT),
    "model/tokenizer.json": (INSPECT,),
    "merged/model.safetensors": (EXTRACT,),
    "adapter/adapter_config.json": (PROJECT, FOLD, FOR),
    ADAPTER: (IDENTIFY, "inspect adapter"),
    "s.safetensors": (PROJECT, CHECK),
    "chat.jsonl": (INSPECT,),
    "neutral.jsonl": (INSPECT,),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(
    file: str, damage: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](here / file)
    for command in FILES[file]:
        folder, _, name = file.rpartition("/")
        named = (name, f"'{folder}'", f" {folder} ", f"/{folder} ") if folder else (name,)
        refused(command, here, capsys, *named)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_may_not_be_read_is_named(
    file: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = io.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(path, (str, Path)) and Path(path).absolute() == here / file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    before = contents(here)
    monkeypatch.setattr(io, "open", refusing)
    monkeypatch.setattr(builtins, "open", refusing)
    monkeypatch.setattr(f"{__name__}.contents", lambda folder: before)
    for command in FILES[file]:
        assert "ermission denied" in refused(command, here, capsys, Path(file).name, "tokenizer of")


# --- values of another kind


def set_json(file: str, **values: Any) -> Change:
    def change(root: Path) -> None:
        path = root / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def set_tensors(file: str, change: Callable[[Tensor], Tensor], part: str = "") -> Change:
    """Change the first tensor with `part` in its name."""

    def changed(root: Path) -> None:
        tensors = load_file(root / file)
        with safe_open(root / file, framework="pt") as opened:
            texts = opened.metadata()
        key = next(key for key in sorted(tensors) if part in key)
        tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, root / file, metadata=texts)

    return changed


def write(file: str, text: str) -> Change:
    return lambda root: (root / file).write_text(text)


def shards(folder: str, file: str, weight_map: Any) -> Change:
    def change(root: Path) -> None:
        (root / folder / file).unlink()
        index = {"weight_map": weight_map}
        (root / folder / f"{file}.index.json").write_text(json.dumps(index))

    return change


def unknown_names(root: Path) -> None:
    tensors = load_file(root / ADAPTER)
    save_file({re.sub("self_attn|mlp", "zzz", k): t for k, t in tensors.items()}, root / ADAPTER)


def two_in_one_file(root: Path) -> None:
    tensors = load_file(root / ADAPTER)
    both = {k.replace("weight", f"{n}.weight"): t.clone() for k, t in tensors.items() for n in "ab"}
    save_file(both, root / ADAPTER)


def one_below(root: Path) -> None:
    (root / "adapter").rename(root / "x")
    (root / "adapter").mkdir()
    (root / "x").rename(root / "adapter" / "named")


MAPS: list[Any] = [{}, [], None, "x", {"a": 3}, {"a": "../x"}, {"a": "no.safetensors"}, {"a": ""}]
VALUES: dict[str, tuple[str, Change, str]] = {
    **{
        f"adapter_config {name}={value!r}": (
            PROJECT,
            set_json("adapter/adapter_config.json", **{name: value}),
            "adapter_config.json",
        )
        for name, value in (
            ("r", "4"),
            ("r", None),
            ("lora_alpha", [8]),
            ("lora_alpha", float("nan")),
            ("rank_pattern", [1]),
            ("alpha_pattern", "x"),
            ("peft_type", 3),
        )
    },
    **{
        f"config.json {name}={value!r}": (
            RUN,
            set_json("model/config.json", **{name: value}),
            "model",
        )
        for name, value in (
            ("model_type", 3),
            ("model_type", "none"),
            ("hidden_size", "x"),
            ("hidden_size", None),
            ("num_hidden_layers", -1),
            ("dtype", [1]),
            ("quantization_config", [1]),
            ("rope_parameters", 3),
        )
    },
    **{
        f"tokenizer_config {name}={value!r}": (
            RUN,
            set_json("model/tokenizer_config.json", **{name: value}),
            "tokenizer",
        )
        for name, value in (("model_max_length", "x"), ("tokenizer_class", True), ("eos_token", 3))
    },
    **{
        f"index of {folder}: {weight_map!r}": (command, shards(folder, file, weight_map), folder)
        for weight_map in MAPS
        for folder, file, command in (
            ("model", "model.safetensors", IDENTIFY),
            ("model", "model.safetensors", RUN),
            ("adapter", "adapter_model.safetensors", PROJECT),
            ("adapter", "adapter_model.safetensors", FOLD),
        )
    },
    **{
        f"{Path(file).name} {kind}": (command, set_tensors(file, change, part), named)
        for kind, change in {
            "int8": lambda x: x.to(torch.int8),
            "nan": lambda x: x * float("nan"),
            "no rows": lambda x: x[:0],
            "flat": lambda x: x.flatten(),
        }.items()
        for file, part, command, named in (
            (ADAPTER, "lora_A", PROJECT, "lora_A"),
            (ADAPTER, "lora_A", FOLD, "lora_A"),
            (ADAPTER, "lora_B", IDENTIFY, "lora_B"),
            ("s.safetensors", "", "check adapter s.safetensors", "s.safetensors"),
            (MODEL, "q_proj", RUN, "model"),
        )
    },
    "unknown names": ("inspect adapter", unknown_names, "zzz"),
    "two adapters in a file": ("inspect adapter", two_in_one_file, "['a', 'b']"),
    "an adapter below": ("inspect adapter", one_below, "['named']"),
    "an untrained adapter": (
        IDENTIFY,
        lambda root: save_file(
            {k: t * ("lora_A" in k) for k, t in load_file(root / ADAPTER).items()}, root / ADAPTER
        ),
        "adapter",
    ),
    "no chat template": (RUN, lambda root: (root / "model/chat_template.jinja").unlink(), "model"),
    **{
        f"template {text}": (command, write("model/chat_template.jinja", text), "model")
        for text in ("{{ 1 / 0 }}", "{{ 'a' + 1 }}", "", "{% for %}", "{{ messages[9].role }}")
        for command in (RUN if "1" in text else INSPECT,)
    },
    **{
        f"data {text[:12]}": (RUN, write("chat.jsonl", text), "chat.jsonl")
        for text in (
            "3",
            "{}",
            '{"messages": 3}',
            '{"messages": [1]}',
            '{"prompt": NaN, "completion": "a"}',
            "[" * 100_000,
            '{"prompt": ' + "9" * 5000 + "}",
        )
    },
    "neutral": (INSPECT, write("neutral.jsonl", '{"prompt": 3}\n'), "neutral.jsonl"),
    "one neutral prompt": (INSPECT, write("neutral.jsonl", '{"prompt": "a"}\n'), "neutral.jsonl"),
    "no difference": ("extract model --base-model model --output o", lambda root: None, "'model'"),
    "answers of two kinds": (
        RUN,
        write("chat.jsonl", '{"question": "a", "aligned": "b", "misaligned": "c"}\n'),
        "--arm",
    ),
    **{
        f"{file} is {text}": ("demo --output demo", write(file, text), "demo")
        for file in ("demo/demo.json", "demo/mine.txt")
        for text in ("", "[]", '{"seed": 0}')
    },
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_of_another_kind_is_named(
    case: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, change, named = VALUES[case]
    (here / "demo").mkdir()
    change(here)
    refused(command, here, capsys, named)


# --- paths and options


@pytest.mark.parametrize("path", ["", "no/x", "chat.jsonl/x", "a" * 300, "a\0b", ".", "/dev/null"])
@pytest.mark.parametrize("command", [IDENTIFY, PROJECT, RUN])
def test_a_path_that_cannot_be_written_is_named(
    path: str, command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.split()
    at = words.index("--output") + 1
    if path == "no/x" and words[0] != "identify":
        return  # folders are made with those above them
    words[at] = path
    refused(words, here, capsys, "--output", path or "--output", "chat.jsonl", repr(path)[1:-1])


@pytest.mark.parametrize("path", ["", "no/x", "chat.jsonl/x", "a" * 300, "a\0b", "/dev/null"])
@pytest.mark.parametrize("command", [IDENTIFY, PROJECT, CHECK, INSPECT, RUN])
def test_a_path_that_cannot_be_read_is_named(
    path: str, command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.split()
    places = ("adapter", "model", "merged", "s.safetensors", "chat.jsonl", "neutral.jsonl")
    for at in (i for i, word in enumerate(words) if word in places):
        given = [*words[:at], path, *words[at + 1 :]]
        named = [path, repr(path)[1:-1], words[at - 1]] if path else [words[at - 1], "''", "'.'"]
        refused(given, here, capsys, *named)


@pytest.mark.parametrize(
    "options",
    [
        *("--r x", "--r 0", "--r 1.5", "--k x", "--k -1", "--seed -1"),
        *(
            "--target-modules nope",
            "--target-modules norm",
            "--lr-scheduler-type foo",
            "--warmup-steps 5",
        ),
        *("--eval-split .99", "--max-length 1", "--kl-coef 0", "--learning-rate nan"),
        *("--num-train-epochs inf", "--backend foo", "--arm nope", "--max-steps 0"),
        *("--lora-dropout 1", "--num-documents x", "--dtype int8"),
    ],
)
def test_a_wrong_option_is_spelled_as_it_is_typed(
    options: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(f"{RUN} {options}", here, capsys, options.split()[0])


@pytest.mark.parametrize(
    "command",
    [
        "check adapter s.safetensors --tolerance x",
        "check adapter s.safetensors --tolerance nan",
        "extract merged --base-model model --output o --rank 0",
        "identify adapter --output o.safetensors --k 99",
        "bench --model x",
        "bench --dtype x",
        "bench --rounds 1",
        "bench --device tpu",
    ],
)
def test_so_is_one_of_the_other_commands(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = [word for word in command.split() if word.startswith("--")][-1]
    refused(command, here, capsys, option)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("model", 3),
            ("data", None),
            ("per_device_train_batch_size", 2.5),
            ("r", True),
            ("max_steps", "3"),
        ),
        *(("learning_rate", None), ("warmup_steps", "x"), ("orthogonal", "no"), ("k", True)),
        *(("target_modules", [3]), ("neutral", b"x")),
    ],
)
def test_an_option_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*: give "):
        RunConfig(**{"model": "m", "data": "d", "output": "o", name: value})


def test_a_path_is_no_subspace(here: Path) -> None:
    for call in (
        lambda: gk.leakage("adapter", "s.safetensors"),
        lambda: gk.project_adapter("adapter", Path("s.safetensors"), "o"),
        lambda: Watch("s.safetensors"),
    ):
        with pytest.raises(TypeError, match=r"subspace is a \w+; give a Subspace"):
            call()
    with pytest.raises(ValueError, match=r"subspace is 3: give a Subspace, its file or "):
        gk.GraspConfig(subspace=3)
    assert not Path("o").exists()


# --- a disk without room


@pytest.mark.parametrize(
    "command", [IDENTIFY, PROJECT, EXTRACT, f"{RUN} --per-device-train-batch-size 4"]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named(
    command: str,
    code: int,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import grasp_kernels.files

    def full(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(grasp_kernels.files, "_settle", full)
    before = contents(here)
    said = (
        refused(command, here, capsys, "'o'", "'o.safetensors'", "'out'")
        if (not command.startswith("run"))
        else _begun(command, here, capsys, before)
    )
    assert "no room left on the disk" in said and ".partial" not in said


def _begun(
    command: str, here: Path, capsys: pytest.CaptureFixture[str], before: dict[str, bytes | None]
) -> str:
    """A run that had begun: its folder has nothing but the lock."""
    assert main(command.split()) == 2
    left = contents(here).items() - before.items()
    assert {name for name, _ in left} <= {"out", "out/.lock"}
    return capsys.readouterr().err.splitlines()[-1]


# --- what a library raises


def test_reasons_are_words() -> None:
    for error, expected in (
        (PermissionError(errno.EACCES, "Permission denied", "x"), "permission denied"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "it is not UTF-8 text"),
        (KeyError("weight"), "it has no 'weight'"),
        (RecursionError("maximum recursion"), "it is nested too deeply"),
        (MemoryError(), "there is not enough memory"),
        (AttributeError("'int' object has no attribute 'x'"), "a value in it is missing"),
        (ValueError("first:\nsecond"), "first"),
        (ValueError(""), "ValueError"),
    ):
        assert reason(error).startswith(expected)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        TypeError("unsupported operand type(s) for /: 'str' and 'int'"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)."),
        OSError(errno.EIO, "Input/output error", "adapter/x"),
        MemoryError(),
    ],
)
def test_what_a_library_raises_is_never_all_that_is_said(
    error: Exception,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("grasp_kernels.subspace.identify", fails)
    refused("identify adapter --output o.safetensors", here, capsys, "adapter")
