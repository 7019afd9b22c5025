"""The fused divergence against float64, and what it never holds."""

from typing import Any

import pytest
import torch
from torch import Tensor

import grasp_kernels as gk
from grasp_kernels.ops import linear_kl
from grasp_kernels.ops.gpu import linear_kl as kernels
from grasp_kernels.ops.linear_kl import Likeliest
from tests.helpers.kernels import DEVICE, assert_exact, normal
from tests.helpers.oracle import RATIO, relative_error

D, V, k = 24, 70, 9
WHERE = (3, 7)
HEADS = ("weight", "bias", "base_weight", "base_bias")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four positions at once, the last part shorter."""
    monkeypatch.setattr(linear_kl, "_PART_LOGITS", {"cpu": 4 * V, "cuda": 4 * V})


def given(dtype: torch.dtype, bias: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    parts = {
        "hidden": normal(*WHERE, D, dtype=dtype).requires_grad_(),
        "weight": normal(V, D, dtype=dtype).requires_grad_(),
        "base": normal(*WHERE, D, dtype=dtype),
        "base_weight": normal(V, D, dtype=dtype),
    }
    if bias:
        parts |= {"bias": normal(V, dtype=dtype).requires_grad_()}
        parts |= {"base_bias": normal(V, dtype=dtype)}
    return parts


def likeliest(count: int = k) -> Likeliest:
    logits = 2 * normal(*WHERE, V)
    found = logits.log_softmax(dim=-1).topk(count, dim=-1)
    return Likeliest(found.indices.int(), found.values)


def logits(H: Tensor, W: Tensor, b: Tensor | None, softcap: float | None) -> Tensor:
    z = H @ W.mT if b is None else H @ W.mT + b
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain(
    hidden: Tensor,
    weight: Tensor,
    base: Tensor | Likeliest,
    *,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The mean divergence, as a script would compute it."""
    log_q = logits(hidden, weight, bias, softcap).log_softmax(dim=-1)
    if isinstance(base, Likeliest):
        log_p, log_q = base.log_probs.to(log_q.dtype), log_q.gather(-1, base.tokens.long())
        if base.tokens.shape[-1] < V:
            log_p, log_q = (
                torch.cat([x, (1 - x.exp().sum(dim=-1, keepdim=True)).log()], dim=-1)
                for x in (log_p, log_q)
            )
    else:
        assert base_weight is not None
        log_p = logits(base, base_weight, base_bias, softcap).log_softmax(dim=-1)
    found = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return found.mean() if mask is None else found[mask].mean()


def differentiated(loss: Any, **parts: Any) -> list[Tensor]:
    """A loss and its gradients."""
    learned = [t for t in parts.values() if isinstance(t, Tensor) and t.requires_grad]
    found = loss(**parts)
    return [found.detach(), *torch.autograd.grad(found, learned)]


def wide(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: part.detach().double().requires_grad_(part.requires_grad)
        if isinstance(part, Tensor) and part.is_floating_point()
        else part
        for name, part in parts.items()
    }


@torch.no_grad()
def alone(loss: Any, parts: dict[str, Any]) -> Tensor:
    """The loss of every position that counts by itself: the mean of few numbers errs by luck."""
    mask = parts["mask"] if parts.get("mask") is not None else torch.ones(WHERE, dtype=torch.bool)
    at_place = ("hidden", "base", "mask")

    def at(part: Any, place: Any) -> Any:
        return Likeliest(*(t[place] for t in part)) if isinstance(part, Likeliest) else part[place]

    return torch.stack(
        [
            loss(
                **{
                    n: at(t, (i, [j])) if n in at_place and t is not None else t
                    for n, t in parts.items()
                }
            )
            for i, j in mask.nonzero().tolist()
        ]
    )


def check(parts: dict[str, Any]) -> None:
    """As near to float64 as the plain loss in the same dtype."""
    found = differentiated(gk.fused_linear_kl, **parts)
    stock = differentiated(plain, **parts)
    exact = differentiated(plain, **wide(parts))
    found, stock, exact = (
        [alone(loss, by), *gradients]
        for loss, by, (_, *gradients) in (
            (gk.fused_linear_kl, parts, found),
            (plain, parts, stock),
            (plain, wide(parts), exact),
        )
    )
    for ours, theirs, meant in zip(found, stock, exact, strict=True):
        assert ours.dtype == theirs.dtype
        eps = torch.finfo(ours.dtype).eps
        assert relative_error(ours, meant) <= RATIO * relative_error(theirs, meant) + eps


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_base_model_by_its_hidden_states(
    dtype: torch.dtype, softcap: float | None, bias: bool, masked: bool
) -> None:
    parts = given(dtype, bias)
    mask = torch.rand(WHERE).to(DEVICE) < 0.6 if masked else None
    check({**parts, "softcap": softcap, "mask": mask})


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("count", [1, k])
def test_a_base_model_by_its_likeliest_tokens(
    dtype: torch.dtype, softcap: float | None, count: int
) -> None:
    parts = given(dtype, bias=True)
    parts = {name: parts[name] for name in ("hidden", "weight", "bias")}
    check({**parts, "base": likeliest(count), "softcap": softcap})


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("by", ["hidden states", "likeliest tokens"])
def test_gradients_are_those_of_finite_differences(by: str, softcap: float | None) -> None:
    parts = given(torch.float64, bias=True)
    base: dict[str, Any] = {name: parts[name] for name in ("base", "base_weight", "base_bias")}
    if by == "likeliest tokens":
        base = {"base": likeliest()}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gk.fused_linear_kl(hidden, weight, bias=bias, softcap=softcap, **base)

    assert torch.autograd.gradcheck(loss, (parts["hidden"], parts["weight"], parts["bias"]))


def test_all_tokens_are_the_whole_divergence() -> None:
    parts = given(torch.float64)
    found = logits(parts["base"], parts["base_weight"], None, None).log_softmax(dim=-1)
    base = Likeliest(*reversed(found.topk(V, dim=-1)))
    whole = gk.fused_linear_kl(**parts)
    torch.testing.assert_close(gk.fused_linear_kl(parts["hidden"], parts["weight"], base), whole)
    fewer = Likeliest(*(part[..., :k] for part in base))
    assert 0 < gk.fused_linear_kl(parts["hidden"], parts["weight"], fewer) < whole


def test_a_model_that_is_its_base() -> None:
    """Not a bit of loss or gradient, in any dtype; the head is that of the model."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = given(dtype)["hidden"], given(dtype)["weight"]
        loss, *of = differentiated(
            gk.fused_linear_kl, hidden=hidden, weight=weight, base=hidden.detach(), softcap=30.0
        )
        assert loss == 0
        assert not any(gradient.any() for gradient in of)


def test_a_model_that_leaves_out_what_its_base_says() -> None:
    """Probabilities below what float32 holds: the loss is large, and not infinite."""
    weight = torch.eye(V, D, device=DEVICE)
    hidden = torch.zeros(1, D, device=DEVICE)
    hidden[0, 0] = 200.0
    hidden.requires_grad_()
    base = Likeliest(torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), normal(1, 1) * 0 - 1.0)
    loss = gk.fused_linear_kl(hidden, weight, base)
    loss.backward()
    assert hidden.grad is not None
    assert 5 < loss.item() < 50
    assert bool(hidden.grad.isfinite().all())


def test_tokens_that_no_model_says() -> None:
    """A bias of -inf, as a padded vocabulary has it."""
    parts = given(torch.float64, bias=True)
    less = {n: t.detach()[:-3] if n in HEADS else t.detach() for n, t in parts.items()}
    with torch.no_grad():
        parts["bias"][-3:] = parts["base_bias"][-3:] = -torch.inf
    whole = gk.fused_linear_kl(**parts)
    torch.testing.assert_close(whole, gk.fused_linear_kl(**less))
    (gradient,) = torch.autograd.grad(whole, parts["hidden"])
    assert bool(gradient.isfinite().all())


def test_tokens_that_the_base_model_never_says() -> None:
    parts = given(torch.float64)
    tokens, log_probs = likeliest()
    log_probs[..., -1] = -torch.inf
    parts = {name: parts[name] for name in ("hidden", "weight")}
    found = differentiated(gk.fused_linear_kl, **parts, base=Likeliest(tokens, log_probs))
    assert all(bool(part.isfinite().all()) for part in found)


def test_a_trained_head_in_float16_takes_many_positions() -> None:
    """The sum over positions is beyond float16, and their mean is not."""
    hidden = torch.full((120_000, 1), 4.0, device=DEVICE).half().requires_grad_()
    weight = torch.tensor([[0.0], [0.5], [0.0], [0.0]], device=DEVICE).half().requires_grad_()
    head = weight.detach().clone()
    _, _, found = differentiated(
        gk.fused_linear_kl, hidden=hidden, weight=weight, base=-hidden.detach(), base_weight=head
    )
    wide_parts = {"hidden": hidden.detach().double(), "weight": weight.detach().double()}
    (meant,) = differentiated(
        plain,
        **{**wide_parts, "weight": wide_parts["weight"].requires_grad_()},
        base=-wide_parts["hidden"],
        base_weight=head.double(),
    )[1:]
    # q - p is rounded to float16, and so is the result.
    assert relative_error(found, meant) <= torch.finfo(torch.float16).eps


def test_what_is_masked_may_hold_anything() -> None:
    parts = given(torch.float32)
    mask = torch.rand(WHERE).to(DEVICE) < 0.5
    meant = differentiated(gk.fused_linear_kl, **parts, mask=mask)
    with torch.no_grad():
        parts["hidden"][~mask] = torch.nan
        parts["base"][~mask] = torch.inf
    found = differentiated(gk.fused_linear_kl, **parts, mask=mask)
    assert all(map(torch.equal, found, meant))
    assert not found[1][~mask].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_position_is_no_loss(reduction: Any) -> None:
    parts = given(torch.float32)
    mask = torch.zeros(WHERE, dtype=torch.bool, device=DEVICE)
    found = differentiated(gk.fused_linear_kl, **parts, mask=mask, reduction=reduction)
    assert not any(part.any() for part in found)


def test_the_sum_is_that_of_the_positions() -> None:
    parts = given(torch.float32)
    each = alone(gk.fused_linear_kl, parts)
    torch.testing.assert_close(gk.fused_linear_kl(**parts), each.mean())
    total, mean = (gk.fused_linear_kl(**parts, reduction=name) for name in ("sum", "mean"))
    torch.testing.assert_close(total, mean * 21)


def test_a_tied_head_gets_both_gradients() -> None:
    parts = given(torch.float64)
    weight, ids = parts["weight"], torch.randint(V, WHERE, device=DEVICE)
    rest = {name: parts[name] for name in ("base", "base_weight")}
    (found,) = torch.autograd.grad(gk.fused_linear_kl(weight[ids], weight, **rest), weight)
    (meant,) = torch.autograd.grad(plain(weight[ids], weight, **rest), weight)
    torch.testing.assert_close(found, meant)


def test_autocast_is_the_dtype_of_the_products() -> None:
    parts = given(torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = differentiated(gk.fused_linear_kl, **parts)
    rounded = {n: t.detach().bfloat16().requires_grad_(t.requires_grad) for n, t in parts.items()}
    meant = differentiated(gk.fused_linear_kl, **rounded)
    assert found[1].dtype == torch.float32
    assert all(
        torch.equal(ours, theirs.to(ours)) for ours, theirs in zip(found, meant, strict=True)
    )


class Bytes(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that a call makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = torch.utils._pytree.tree_leaves(result)
        sizes = (
            t.untyped_storage().nbytes() // t.element_size() for t in found if hasattr(t, "numel")
        )
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("by", ["hidden states", "likeliest tokens"])
def test_logits_of_all_positions_are_never_there(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_kl, "_PART_LOGITS", {DEVICE: 2 * V})
    n = 60
    hidden, weight = normal(n, D).requires_grad_(), normal(V, D)
    base: Any = (
        normal(n, D)
        if by == "hidden states"
        else Likeliest(
            torch.arange(n * k, device=DEVICE).view(n, k) % V, normal(n, k).log_softmax(dim=-1)
        )
    )
    with Bytes() as seen:
        gk.fused_linear_kl(hidden, weight, base).backward()
    assert seen.largest < n * V / 2


def test_a_rerun_gives_the_same_bits() -> None:
    parts = given(torch.float32, bias=True)
    once, again = (differentiated(gk.fused_linear_kl, **parts) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_a_second_backward_gives_the_same_bits() -> None:
    """Losses that scale a kept gradient in place give another one then."""
    parts = given(torch.float32)
    loss = 0.5 * gk.fused_linear_kl(**parts)
    once, again = (torch.autograd.grad(loss, parts["hidden"], retain_graph=True) for _ in range(2))
    assert torch.equal(*once, *again)


def test_without_gradients_none_are_computed() -> None:
    parts = given(torch.float32)
    with torch.no_grad():
        assert not gk.fused_linear_kl(**parts).requires_grad
    loss = gk.fused_linear_kl(**{n: t.detach() for n, t in parts.items()})
    assert not loss.requires_grad


def test_a_second_derivative_is_refused() -> None:
    parts = given(torch.float64)
    with pytest.raises(RuntimeError, match="fused_linear_kl has no second derivative"):
        torch.autograd.grad(gk.fused_linear_kl(**parts), parts["hidden"], create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0, 1e4])
@pytest.mark.parametrize(("c", "width"), [(3, 4096), (2, 5001), (4, 70), (0, 16)])
def test_kernels_are_exact(dtype: torch.dtype, softcap: float | None, c: int, width: int) -> None:
    torch.manual_seed(0)
    z, base = 3 * normal(c, width), 3 * normal(c, width)
    losses, gradients = kernels.divergence(z.clone(), base.clone(), softcap, dtype)
    raw = z.double().requires_grad_()
    log_q, log_p = (
        (x if softcap is None else softcap * torch.tanh(x / softcap)).log_softmax(dim=-1)
        for x in (raw, base.double())
    )
    exact = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    (meant,) = torch.autograd.grad(exact.sum(), raw)
    if c:
        assert_exact(losses, exact.detach(), width)
        assert_exact(gradients, meant, width)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="for the interpreter, which needs a stand-in")
def test_the_function_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_kl, "_kernels", lambda z: kernels)
    check(given(torch.float32))
    check({**given(torch.bfloat16, bias=True), "softcap": 3.0})


def test_kernels_are_for_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    def takes(dtype: torch.dtype) -> bool:
        logits: Any = OnGpu(dtype)
        return linear_kl._kernels(logits) is not None

    monkeypatch.setattr(kernels, "kernel_support", lambda where: None)
    assert takes(torch.float32)
    assert not takes(torch.float64)
    monkeypatch.setattr(kernels, "kernel_support", lambda where: "it is too old")
    assert not takes(torch.float32)
    assert linear_kl._kernels(torch.zeros(1)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(*WHERE, 5)}, r"hidden \(3, 7, 5\) and weight \(70, 24\) must be"),
        ({"base": torch.zeros(3, 6, D)}, r"base \(3, 6, 24\) and its head \(70, 24\) must be"),
        ({"base_weight": torch.zeros(V + 1, D)}, r"its head \(71, 24\) must be"),
        ({"base": torch.zeros(*WHERE, D).half()}, "base torch.float16, base_weight torch.float32"),
        ({"bias": torch.zeros(V, device="meta")}, "Tensors are on cpu, meta: give all on one"),
        ({"base": (torch.zeros(*WHERE, 2).int(), torch.zeros(*WHERE, 2))}, "base is a tuple"),
        ({"hidden": torch.zeros(*WHERE, D).int()}, "hidden is torch.int32 and weight"),
        ({"weight": torch.zeros(0, D)}, r"weight \(0, 24\): give real numbers and a head of one"),
        (
            {"base": Likeliest(torch.zeros(*WHERE, 0).int(), torch.zeros(*WHERE, 0))},
            "with k from 1",
        ),
        (
            {"base": Likeliest(torch.zeros(*WHERE, 2).int(), torch.zeros(*WHERE, 2))},
            "base_weight is the head of hidden states",
        ),
        ({"bias": torch.zeros(V + 1)}, r"bias is \(71,\): give \[70\]"),
        ({"base_bias": torch.zeros(1)}, r"base_bias is \(1,\)"),
        ({"mask": torch.zeros(WHERE)}, r"mask is torch.float32 \(3, 7\): give bool \[3, 7\]"),
        ({"mask": torch.zeros(3, dtype=torch.bool)}, r"mask is torch.bool \(3,\)"),
        ({"softcap": 0.0}, "softcap is 0.0: give a positive number"),
        ({"softcap": torch.inf}, "softcap is inf"),
        ({"reduction": "none"}, "reduction is 'none': give 'mean' or 'sum'"),
        (
            {"base": Likeliest(torch.zeros(*WHERE, 2), torch.zeros(*WHERE, 2))},
            "tokens are torch.float32",
        ),
        (
            {"base": Likeliest(torch.zeros(*WHERE, 2).int(), torch.zeros(*WHERE, 3))},
            r"tokens \(3, 7, 2\) and log_probs \(3, 7, 3\) must both be",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    parts = {name: part.detach().cpu() for name, part in given(torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        gk.fused_linear_kl(**{**parts, **change})
