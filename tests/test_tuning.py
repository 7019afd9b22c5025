"""Tuned launches: the keys, the file, who consults it, and what the search keeps.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import grasp_kernels as gk
from grasp_kernels.bench import tune as search
from grasp_kernels.bench.candidates import Choice, candidates, shared_memory, table_choice
from grasp_kernels.bench.launches import call_layer, keys_of, work_of
from grasp_kernels.bench.shapes import MODELS, Linear
from grasp_kernels.bench.timing import Times
from grasp_kernels.cli import main, tune_command
from grasp_kernels.ops.gpu import tuning
from grasp_kernels.ops.gpu.launch import PARTS, Launch, dry_run, part_of
from grasp_kernels.ops.gpu.tuning import DownKey, GemmKey, Key, TokensKey
from grasp_kernels.ops.lora_linear.triton import down, gemm, tokens
from grasp_kernels.testing import orthonormal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = part_of(DEVICE)
HOPPER = PARTS["sm_90"]
K, N, R, Q = 48, 40, 4, 3
KERNELS = {"down": down, "tokens": tokens, "gemm": gemm}
# Fields of a choice and what the kernels call them.
BLOCKS = {
    "down": {"t": "BLOCK_T", "k": "BLOCK_K", "r": "BLOCK_R"},
    "tokens": {"t": "BLOCK_T", "c": "BLOCK_C", "r": "BLOCK_R", "wide": "WIDE"},
    "gemm": {"t": "BLOCK_T", "j": "BLOCK_J", "i": "BLOCK_I"},
}
OWN = {"down": "BLOCK_K", "tokens": "BLOCK_C", "gemm": "BLOCK_J"}
MODEL_CASES = [
    (16, 4, torch.bfloat16, False),
    (128, 32, torch.bfloat16, True),
    (16, 0, torch.float32, False),
]


@pytest.fixture(autouse=True)
def nothing_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_in_force", {})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of the tunable kernels, which run all the same."""
    made: list[Launch] = []

    def recording(original: Callable[..., None]) -> Callable[..., None]:
        def launch(kernel, grid, like, num_warps, num_stages, **arguments):  # type: ignore[no-untyped-def]
            made.append(Launch(kernel, grid, arguments, num_warps, num_stages))
            original(kernel, grid, like, num_warps, num_stages, **arguments)

        return launch

    for module in KERNELS.values():
        monkeypatch.setattr(module, "launch", recording(module.launch))
    return made


def layer(T: int) -> list[torch.Tensor]:
    """`y`, `dx`, `dA`, `dB` of one writer on the Triton backend."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, torch.bfloat16)

    x, W, A, B, dy = normal(T, K), normal(N, K), normal(R, K), normal(N, R), normal(T, N)
    V = orthonormal(N, Q, g).to(DEVICE)
    leaves = [leaf.requires_grad_() for leaf in (x, A, B)]
    y = gk.lora_linear(x, W, None, A, B, 0.5, write_basis=V, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def another(key: Key) -> dict[str, int]:
    """A choice other than the table's."""
    return asdict(candidates(key, HERE)[-1])


def kernel_of(made: Launch) -> str:
    """The module that made a launch, by a block size that it alone has."""
    return next(name for name, block in OWN.items() if block in made.arguments)


def fields_of(made: Launch) -> dict[str, int]:
    blocks = BLOCKS[kernel_of(made)]
    return {
        **{field: made.arguments[name] for field, name in blocks.items()},
        "num_warps": made.num_warps,
        "num_stages": made.num_stages,
    }


def test_launchers_take_what_is_loaded(tmp_path: Path, launched: list[Launch]) -> None:
    with tuning.consulted() as asked:
        exact = layer(T=33)
    keys = list(dict.fromkeys(asked))
    assert {key.kernel for key in keys} == set(KERNELS)
    assert not any(fields_of(made) in map(another, keys) for made in launched)
    launched.clear()

    file = tmp_path / "tuning.json"
    tuning.save_tuning(file, HERE.name, {key: another(key) for key in keys})
    assert gk.load_tuning(file) == len(keys)
    for T in (33, 70):
        found = layer(T)
        assert all(fields_of(made) in map(another, keys) for made in launched)
        assert {kernel_of(made) for made in launched} == set(KERNELS)
        if T == 33:
            for f, e in zip(found, exact, strict=True):
                torch.testing.assert_close(f, e, rtol=2**-7, atol=2**-7 * float(e.abs().max()))


def test_an_explicit_choice_wins_over_a_loaded_one(launched: list[Launch]) -> None:
    x, A = torch.randn(8, K, device=DEVICE), torch.randn(R, K, device=DEVICE)
    with tuning.consulted() as asked:
        down.down(x, A)
    tuning._in_force[asked[0]] = asdict(down.DownTile(16, 16, 16, 4, 2))
    down.down(x, A)
    down.down(x, A, tile=down.DownTile(32, 16, 16, 4, 2))
    assert [made.arguments["BLOCK_T"] for made in launched] == [32, 16, 32]


def test_no_key_knows_the_number_of_tokens() -> None:
    linears = MODELS["tiny"].linears
    asked = [keys_of(linears, T, 16, 4, torch.bfloat16, True, HOPPER) for T in (1, 77, 8192)]
    assert asked[0] == asked[1] == asked[2]
    assert all("T" not in key._fields for key in asked[0])


def test_a_tuned_slab_decides_how_often_the_gradient_is_read() -> None:
    """`[dS | D]` of 20 rows costs more than a second read where slabs are 64 columns wide."""
    writer = Linear("o_proj", 4096, 4096, True)

    def launches() -> list[str]:
        with dry_run(HOPPER) as run:
            call_layer(writer, 8192, 16, 4, torch.bfloat16, False)
        return [made.kernel.__name__ for made in run.launches if "down" in made.kernel.__name__]

    assert len(launches()) == 1
    key = TokensKey("sm_90", 2, 4096, 16, 4, 20, True, False)
    tuning._in_force[key] = asdict(tokens.Slab(64, 64, 16, 4, 4))
    assert len(launches()) == 2


KEYS = [
    DownKey(HERE.name, 2, K, R, True, False),
    TokensKey(HERE.name, 2, N, R, Q, R + Q, True, False),
    GemmKey(HERE.name, 2, K, N, R, Q, True, True, False, False),
]


def test_file_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    choices = {key: asdict(table_choice(key, HERE)) for key in KEYS}
    tuning.save_tuning(file, HERE.name, choices)
    assert tuning.read_tuning(file) == choices
    assert tuning._in_force == {}  # reading is not loading
    tuning.save_tuning(file, HERE.name, {KEYS[0]: another(KEYS[0])})
    tuning._in_force.update(choices)
    assert gk.load_tuning(file) == 1
    assert tuning._in_force == {**choices, KEYS[0]: another(KEYS[0])}
    tuning.save_tuning(file, HERE.name, {})
    assert gk.load_tuning(file) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]


def changed(**changes: Any) -> dict[str, Any]:
    """The first choice of a file with some of its fields changed; None leaves one out."""
    key = KEYS[0]._asdict()
    row = {**key, "choice": asdict(table_choice(KEYS[0], HERE)), **changes}
    del row["gpu"]
    return {"choices": [{name: value for name, value in row.items() if value is not None}]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpu": "another GPU"}, "was tuned on 'another GPU' but this machine has"),
        ({"triton": "1.0"}, "with triton 1.0 but"),
        ({"grasp_kernels": "0.0"}, "with grasp_kernels 0.0 but"),
        ({"choices": 3}, "is not a file of tuned launches"),
        ({"choices": [3]}, "choice 1 of .* is not one of a launch"),
        (changed(kernel="up"), "kernel 'up' is unknown"),
        (changed(kernel=None), "kernel None is unknown"),
        (changed(K=None), "it names .*, not"),
        (changed(T=8192), "it names .*'T'"),
        (changed(K="4096"), "K is '4096'"),
        (changed(choice={"t": 64}), "it names .*, not"),
        (changed(choice=[1]), "is not one of a launch"),
        *(
            (changed(choice=asdict(table_choice(KEYS[0], HERE)) | {name: value}), f"{name} is")
            for name, value in (("t", 48), ("k", 8), ("k", 512), ("t", True), ("num_warps", 0))
        ),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    file = tmp_path / "tuning.json"
    tuning.save_tuning(file, HERE.name, {key: asdict(table_choice(key, HERE)) for key in KEYS})
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=sentence) as raised:
        gk.load_tuning(file)
    assert str(raised.value).endswith("with `grasp-kernels tune`.")
    assert tuning._in_force == {}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b"{}"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tuning.json"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        gk.load_tuning(file)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not a file of tuned launches"):
        gk.load_tuning(file)


def milliseconds(median: float, spread: float = 0.02) -> Times:
    return Times(median, median - spread / 2, median + spread / 2)


def test_the_fastest_wins_by_more_than_the_spread() -> None:
    table, a, b = candidates(KEYS[0], HERE)[:3]
    before = milliseconds(1.0)
    times = {table: before, a: milliseconds(0.9), b: milliseconds(0.8)}
    assert search.fastest(times, table) == b
    assert search.fastest({table: before, a: milliseconds(0.99)}, table) == table
    assert search.fastest({table: before, a: milliseconds(0.9, 0.2)}, table) == table
    assert search.fastest({table: milliseconds(1.0, 0.2), a: milliseconds(0.9)}, table) == table
    assert search.fastest({table: before, a: milliseconds(1.0)}, table) == table


def fake_timer(faster: Mapping[int, float], failing: int | None = None) -> search.Timer:
    """Every choice takes 1 ms, but for some by their place among those that are right."""

    def timer(work: search.Work, choices: list[Choice]) -> dict[Choice, Times | Exception]:
        times: dict[Choice, Times | Exception] = {
            choice: milliseconds(faster.get(i, 1.0)) for i, choice in enumerate(choices)
        }
        if failing is not None:
            times[choices[failing]] = RuntimeError("no graph\nand a trace")
        return times

    return timer


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.kernel)
def test_every_candidate_computes_the_same(key: Key) -> None:
    found = candidates(key, HERE)
    outcome = search.tune(key, 33, torch.bfloat16, DEVICE, fake_timer({1: 0.5}))
    assert outcome.dropped == {}
    assert (outcome.table, outcome.chosen) == (found[0], found[1])
    assert (outcome.before, outcome.after) == (1.0, 0.5)
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_and_failing_candidates_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    key, found = KEYS[0], candidates(KEYS[0], HERE)
    exact = torch.randn(4, 64)

    def work(choice: Choice) -> tuple[torch.Tensor, ...]:
        result = torch.empty(4, 64)
        if choice == found[1]:
            raise RuntimeError("out of registers\nand a trace")
        if choice == found[2]:
            result[:, 1:] = exact[:, 1:]  # a column is left as it was
        elif choice == found[3]:
            result.copy_(exact)
            result[2, 2] += 2**-7  # one of many terms is missing
        else:
            result.copy_(exact * (1 + 2**-24))
        return (result,)

    monkeypatch.setattr(search, "work_of", lambda *_: work)
    outcome = search.tune(key, 64, torch.float32, DEVICE, fake_timer({1: 0.5, 2: 0.1}, failing=2))
    assert outcome.dropped == {
        found[1]: "RuntimeError: out of registers",
        found[2]: "its results differ from the table's",
        found[3]: "its results differ from the table's",
        found[5]: "RuntimeError: no graph",
    }
    assert outcome.chosen == found[4]
    text = search.gains([outcome])
    assert "50.0 %" in text and text.count("dropped:") == 4
    with pytest.raises(RuntimeError, match="cannot be timed: RuntimeError: no graph"):
        search.tune(key, 64, torch.float32, DEVICE, fake_timer({}, failing=0))


def test_the_timer_times_what_runs() -> None:
    good, bad = candidates(KEYS[0], HERE)[:2]
    made = []

    def work(choice: Choice) -> tuple[torch.Tensor, ...]:
        made.append(choice)
        if choice == bad:
            raise RuntimeError("no launch")
        return (torch.zeros(1),)

    found = search.timer_on(torch.device("cpu"), rounds=5)(work, [good, bad])
    assert isinstance(found[good], Times) and str(found[bad]) == "no launch"
    assert made.count(good) >= 5


def model_keys(part: str, models: list[str]) -> list[tuple[Key, torch.dtype]]:
    linears = [linear for name in models for linear in MODELS[name].linears]
    return [
        (key, dtype)
        for rank, basis, dtype, dropout in MODEL_CASES
        for key in keys_of(linears, 8192, rank, basis, dtype, dropout, PARTS[part])
    ]


@pytest.mark.parametrize("part", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_candidates_can_be_launched(part: str) -> None:
    for key, dtype in model_keys(part, ["llama-3.1-8b"]):
        work = work_of(key, 512, dtype, torch.device("meta"))
        found = candidates(key, PARTS[part])
        assert found[0] == table_choice(key, PARTS[part])
        assert 4 <= len(found) == len(set(found)) <= 16
        for choice in found:
            assert shared_memory(key, choice) <= PARTS[part].shared_memory
            with dry_run(PARTS[part]) as run:
                work(choice)
            assert fields_of(run.launches[0]) == asdict(choice)


def test_what_is_tuned_is_what_is_launched() -> None:
    """Keys of the operator and of the launch that is timed for each are the same."""
    for key, dtype in model_keys("sm_90", ["qwen2.5-0.5b"]):
        work = work_of(key, 64, dtype, torch.device("meta"))
        with dry_run(HOPPER), tuning.consulted() as asked:
            work(None)  # type: ignore[arg-type]  # no choice: the launcher asks
        assert set(asked) == {key}


def test_the_command_needs_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["tune", "--models", "tiny", "--output", str(tmp_path / "tuning.json")]
    assert main(arguments) == 2
    assert "tuning times kernels on a GPU and torch sees none" in capsys.readouterr().err
    for option, value, sentence in (
        ("--models", "gpt", "model 'gpt' is unknown"),
        ("--dtype", "int8", "dtype 'int8' is unknown"),
        ("--rank", "0", "--rank is 0"),
    ):
        assert main([*arguments, option, value]) == 2
        assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_keeps_what_it_finds_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tuning.json"
    monkeypatch.setattr(tune_command, "_device", lambda: DEVICE)
    monkeypatch.setattr(tune_command, "_linears", lambda _: [Linear("o_proj", K, N, True)])
    monkeypatch.setattr(search, "timer_on", lambda *_: fake_timer({1: 0.5}))
    arguments = ["tune", "--models", "tiny", "--rank", "4", "--basis", "3", "--tokens", "16"]
    real, calls = search.tune, []

    def stopped(key: Key, *others: Any) -> search.Outcome:
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(key, *others)

    monkeypatch.setattr(search, "tune", stopped)
    assert main([*arguments, "--output", str(file)]) == 130
    assert "the choices so far are in the file" in capsys.readouterr().err
    assert list(tuning.read_tuning(file)) == calls[:2]

    assert main([*arguments, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "2 were in the file already" in printed and "50.0 %" in printed
    found = tuning.read_tuning(file)
    assert found == {key: asdict(candidates(key, HERE)[1]) for key in found}
    assert len(found) > 2
    assert tuning._in_force == {}
    assert main([*arguments, "--output", str(tmp_path / "no" / "folder.json")]) == 2
