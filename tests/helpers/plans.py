"""Layers with a plan, in C++ and in Python."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_kernels.layers import plan
from grasp_kernels.layers.linear import GraspLoRALinear
from tests.helpers.oracle import orthonormal

K, N, T = 24, 32, 6
COMPILED = plan.compiled()
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "wide": (torch.float64, torch.float32),
}


@pytest.fixture(params=["compiled", "python"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(plan, "compiled", lambda: "not asked for")
    elif isinstance(COMPILED, str):
        pytest.skip(f"the calls of layers are not compiled: {COMPILED}")
    return str(request.param)


def a_layer(
    Q: int = 2,
    project: str = "residual",
    closed: bool = True,
    dtype: str = "float32",
    **options: Any,
) -> GraspLoRALinear:
    torch.manual_seed(0)
    of_base, of_adapter = DTYPES[dtype]
    conv = options.pop("conv", False)
    bias = options.pop("bias", False)
    base = Conv1D(N, K) if conv else nn.Linear(K, N, bias=bias)
    options = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["0"],
        "init_lora_weights": False,
        **options,
    }
    model = get_peft_model(nn.Sequential(base.to(of_base)), LoraConfig(**options))
    layer: Any = model.base_model.model[0]
    layer.lora_A.to(of_adapter)
    layer.lora_B.to(of_adapter)
    V = orthonormal(N, Q, torch.Generator().manual_seed(1)) if Q else None
    GraspLoRALinear.adopt(layer, V, project, closed, "auto")
    return layer


def an_input(dtype: torch.dtype = torch.float32, tokens: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, tokens, K, generator=generator).to(dtype)


def planned(**options: Any) -> tuple[GraspLoRALinear, Any, Tensor]:
    """A layer, its plan, and an input that the plan computes."""
    layer, x = a_layer(**options), an_input()
    layer(x)
    assert layer._plan is not None
    assert layer._plan.run(layer, x, None) is not None
    return layer, layer._plan, x


def everything(layer: GraspLoRALinear, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the adapter."""
    torch.manual_seed(7)  # of the mask
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]
