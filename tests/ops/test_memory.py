"""The aten backend allocates nothing of the size of an activation but Y and dX."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grasp_kernels.ops.lora_linear import aten, dropout
from grasp_kernels.ops.lora_linear.operands import Needs, Operands
from tests.helpers.oracle import Case, make_inputs

CASE = Case(T=64, K=48, N=40, R=4, Q=2)


class Allocations(TorchDispatchMode):
    """Shapes of all new tensors that are at least as large as the smaller activation."""

    def __init__(self) -> None:
        super().__init__()
        self.large: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        fresh = (
            tensor
            for tensor in tree_leaves(result)
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in given
        )
        limit = CASE.T * min(CASE.K, CASE.N)
        self.large += [tuple(tensor.shape) for tensor in fresh if tensor.numel() >= limit]
        return result


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("residual", [True, False])
def test_only_the_results_are_large(
    dropout_p: float, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropout, "BLOCK_ELEMENTS", 8 * CASE.K)  # 8 rows of the mask at a time
    inputs = make_inputs(CASE)
    x, dy = inputs["x"], inputs["dy"]
    names = ("weight", "bias", "lora_A", "lora_B", "lora_bias", "write_basis")
    seed = dropout.host_seed(x) if dropout_p else None
    tensors = (*(inputs[n] for n in names), seed)
    op = Operands(*tensors, 0.5, dropout_p, residual, True)
    with Allocations() as forward:
        _, saved = aten.forward(x, op)
    assert forward.large == [(CASE.T, CASE.N)]
    with Allocations() as backward:
        aten.backward(dy, x, saved, op, Needs(True, False, False, True, True, False))
    assert backward.large == [(CASE.T, CASE.K)]
