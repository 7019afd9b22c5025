"""Time every backend on this machine, compared with stock peft.

Each is checked against float64 on the linear layers of a known decoder. Then forward and backward
are timed with `torch.utils.benchmark`; the time of Python counts, as in a training step.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from grasp_kernels.cpu import warn_if_slow
from grasp_kernels.layers.linear import GraspLoRALinear
from grasp_kernels.ops import project_gradient
from grasp_kernels.ops.lora_linear import registry
from grasp_kernels.ops.projection import project_columns
from grasp_kernels.pages.markdown import table

# Hidden width, intermediate width, width of queries, width of keys and values.
MODELS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (256, 512, 256, 128),
    "qwen2.5-0.5b": (896, 4864, 896, 128),
    "qwen2.5-7b": (3584, 18944, 3584, 512),
    "llama-3.2-1b": (2048, 8192, 2048, 512),
    "llama-3.1-8b": (4096, 14336, 4096, 1024),
    "llama-3.1-70b": (8192, 28672, 8192, 1024),
}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TIMED = registry.BACKENDS[:-1]  # not the reference: it is not made for speed
_USUAL = {"cuda": ("llama-3.1-8b", 8192), "cpu": ("qwen2.5-0.5b", 512)}  # model and tokens
_CHECKED_TOKENS = 64  # enough to see a missing term, little enough for float64
# In units of the error of stock peft, or of the machine epsilon if that is larger: rounding differs
# between backends, but a missing term is a relative error near 1.
_MOST_ERROR = 8


class Refusal(NamedTuple):
    """Hold the reason for a missing time.

    `kind` is "unavailable" (it cannot run here), "wrong" (its results are wrong) or "failed" (it
    raised an error).
    """

    kind: str
    reason: str


Found = dict[str, float | Refusal]


class Timed(NamedTuple):
    """Hold the times of one linear layer: "peft", every backend and "auto".

    Each is in milliseconds of forward and backward, or a `Refusal`.
    """

    name: str
    K: int
    N: int
    found: Found


def compare(
    model: str | None = None,
    *,
    dtype: str = "bfloat16",
    tokens: int | None = None,
    rank: int = 16,
    basis: int = 4,
    seconds: float = 0.5,
    device: str | None = None,
) -> Iterator[Timed]:
    """Time stock peft and each backend on the seven linears of a decoder layer, one after another.

    Args:
        model: a name in `MODELS`; the linears have its shapes. None: llama-3.1-8b on a GPU,
            qwen2.5-0.5b on a CPU.
        dtype: dtype of weights and activations, "float32", "float16" or "bfloat16".
        tokens: tokens in a call; None: 8192 on a GPU, 512 on a CPU.
        rank: LoRA rank of the adapter.
        basis: directions in the basis of the writers; 0: nothing is projected.
        seconds: time of each measurement, at least.
        device: "cpu", "cuda" or one of several GPUs; None: "cuda" if there is a GPU.

    Raises:
        ValueError: an unknown name, a number out of range, or no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    if kind not in _USUAL or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device is {name!r}, which cannot be timed here; use 'cpu', or 'cuda' with a GPU."
        )
    model, tokens = model or _USUAL[kind][0], _USUAL[kind][1] if tokens is None else tokens
    for what, given, known in (("model", model, MODELS), ("dtype", dtype, _DTYPES)):
        if given not in known:
            raise ValueError(f"{what} is {given!r}, which is unknown; use one of {sorted(known)}.")
    for what, value, least in (("tokens", tokens, 1), ("rank", rank, 1), ("basis", basis, 0)):
        if value < least:
            raise ValueError(f"{what} is {value}; give at least {least}.")
    if kind == "cpu":
        warn_if_slow(
            _DTYPES[dtype],
            "stock peft is slow in it, so ratios to peft mean little; time float32 instead",
        )
    hidden, intermediate, query, key_value = MODELS[model]
    for linear, K, N, writes in (
        ("q_proj", hidden, query, False),
        ("k_proj", hidden, key_value, False),
        ("v_proj", hidden, key_value, False),
        ("o_proj", query, hidden, True),
        ("gate_proj", hidden, intermediate, False),
        ("up_proj", hidden, intermediate, False),
        ("down_proj", intermediate, hidden, True),
    ):
        torch.manual_seed(0)
        V = torch.linalg.qr(torch.randn(N, basis))[0].to(name) if writes and basis else None
        stock = _stock(K, N, rank, V).to(name, _DTYPES[dtype])
        yield Timed(linear, K, N, _measured(stock, V, tokens, seconds))


def _stock(K: int, N: int, R: int, V: Tensor | None) -> Any:
    """Make peft's layer with a closed B, so that stock peft and the backends compute the same."""
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["linear"])
    holder = nn.ModuleDict({"linear": nn.Linear(K, N, bias=False)})
    layer: Any = inject_adapter_in_model(config, holder)["linear"]
    B = layer.lora_B["default"].weight
    with torch.no_grad():
        B.copy_(project_columns(B.normal_(std=R**-0.5), None if V is None else V.cpu()))
    return layer


def _measured(stock: Any, V: Tensor | None, tokens: int, seconds: float) -> Found:
    """Return the time of stock peft and of each backend, or the reason for a missing time."""
    weight = stock.base_layer.weight
    found: Found = {"peft": _time(stock, tokens, seconds)}
    wide, own = (_results(layer, V) for layer in (copy.deepcopy(stock).double(), stock))
    for backend in (*_TIMED, "auto"):
        reason = _unavailable(backend, weight)
        if reason is not None:
            found[backend] = Refusal("unavailable", reason)
            continue
        try:
            ours = copy.deepcopy(stock, {id(weight): weight})  # on the same frozen weight
            GraspLoRALinear.adopt(ours, V, "residual", True, backend)
            wrong = _wrong(_results(ours, None), own, wide)
            found[backend] = Refusal("wrong", wrong) if wrong else _time(ours, tokens, seconds)
        except Exception as error:  # after any error the others are still timed
            lines = str(error).strip().splitlines() or ["no message"]
            found[backend] = Refusal("failed", f"it raised {type(error).__name__}: {lines[0]}")
    return found


def _unavailable(backend: str, weight: Tensor) -> str | None:
    if backend == "auto":  # it chooses a backend for each shape
        return None
    reason = registry.backends(weight.device)[backend]
    if reason is None and backend in registry.KERNELS and weight.device.type == "cpu":
        return "kernels that run in an interpreter on a CPU are not timed"
    if reason is None and not registry.computes(backend, weight.dtype):
        return f"it does not compute {str(weight.dtype).removeprefix('torch.')}"
    return reason


def _results(layer: Any, V: Tensor | None) -> dict[str, Tensor]:
    """Return `y`, `dx`, `dA` and `dB` of a few tokens; the gradient is projected off a basis."""
    A, B = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
    x, dy = _inputs(layer, _CHECKED_TOKENS)
    y = project_gradient(layer(x), V)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": project_columns(dB, V)}


def _inputs(layer: Any, T: int) -> tuple[Tensor, Tensor]:
    """Draw `x[T, K]` and `dy[T, N]`, the same in each dtype."""
    weight, generator = layer.base_layer.weight, torch.Generator().manual_seed(1)
    N, K = weight.shape
    x, dy = (torch.randn(T, width, generator=generator).to(weight) for width in (K, N))
    return x.requires_grad_(), dy


def _wrong(found: dict[str, Tensor], own: dict[str, Tensor], wide: dict[str, Tensor]) -> str:
    """Return the results with more error than rounding explains, with their relative error."""
    over = []
    for name, exact in wide.items():
        scale = torch.linalg.vector_norm(exact)
        error, usual = (
            float(torch.linalg.vector_norm(part[name].double() - exact) / scale)
            for part in (found, own)
        )
        if not error <= _MOST_ERROR * max(usual, torch.finfo(found[name].dtype).eps):
            over.append(f"{name} {error:.1e}")
    return ", ".join(over)


def _time(layer: Any, tokens: int, seconds: float) -> float:
    """Return the median milliseconds of forward and backward."""
    x, dy = _inputs(layer, tokens)

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def report(timed: list[Timed]) -> str:
    """Return a Markdown table with sums over all linears, and the name of the fastest backend.

    A provider gets a sum if each of its linears was timed.
    """
    names = list(timed[0].found)
    columns = {name: [line.found[name] for line in timed] for name in names}
    sums = {
        name: sum(times)
        for name, column in columns.items()
        if len(times := [time for time in column if isinstance(time, float)]) == len(timed)
    }

    def cell(time: float | Refusal) -> str:
        return time.kind if isinstance(time, Refusal) else f"{time:.2f}"

    def whole(name: str) -> str:
        return f"{sums[name]:.2f} ({sums[name] / sums['peft']:.2f})" if name in sums else "–"

    rows = [
        [line.name, f"{line.K}→{line.N}", *(cell(line.found[name]) for name in names)]
        for line in timed
    ]
    sections = [
        table(["linear", "K→N", *names], [*rows, ["**all**", "", *map(whole, names)]]),
        "Milliseconds, forward + backward, median (ratio to stock peft, which projects nothing).",
    ]
    refused = {
        f"- {name} {time.kind}: {time.reason}"
        for name, column in columns.items()
        for time in column
        if isinstance(time, Refusal)
    }
    sections += ["\n".join(sorted(refused))] if refused else []
    ours = {name: sums[name] for name in _TIMED if name in sums}
    if ours:
        sections.append(f'Fastest here: backend="{min(ours, key=ours.__getitem__)}".')
    return "\n\n".join(sections)
