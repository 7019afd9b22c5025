"""Closure under every optimizer: what is trained is what is saved, and saving changes nothing.

Those of libraries that are not installed are skipped; with `pip install pytorch_optimizer
schedulefree galore_torch bitsandbytes` they run too.
"""

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import grasp_kernels as gk
from tests.helpers.comparisons import assert_same_logits, logits
from tests.helpers.models import a_subspace, tiny_model, tiny_peft_model, tokens
from tests.helpers.oracle import relative_error

pytestmark = pytest.mark.slow  # torchao compiles for its own
STEPS = 4
Make = Callable[[nn.Module], Any]


class Raw:
    """Sign descent that torch does not know of, past the version counters."""

    def __init__(self, parameters: Iterator[Tensor]) -> None:
        self.parameters = list(parameters)

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure()
        for parameter in self.parameters:
            parameter.data.sub_(parameter.grad.sign() + parameter.data, alpha=1e-2)


class Averaged(torch.optim.Optimizer):
    """Sign descent whose weights are swapped for an average that no step has closed."""

    def __init__(self, parameters: Iterator[Tensor]) -> None:
        super().__init__(list(parameters), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        closure()
        for parameter in self.param_groups[0]["params"]:
            mean = self.state[parameter].setdefault("mean", parameter.clone())
            mean.lerp_(parameter - 1e-2 * parameter.grad.sign(), 0.5)
            parameter.sub_(parameter.grad.sign(), alpha=1e-2)

    @torch.no_grad()
    def eval(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["mean"])


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


def of(kind: Any, **options: Any) -> Make:
    """An optimizer with a weight decay that its step depends on, if it has one."""
    known = inspect.signature(kind).parameters
    wanted = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, **options}
    return lambda model: kind(trained(model), **{k: v for k, v in wanted.items() if k in known})


def of_trainer(name: str) -> Make:
    def make(model: nn.Module) -> Any:
        options = {"optim_target_modules": ["lora_A", "lora_B"]} if "galore" in name else {}
        arguments = TrainingArguments(
            mkdtemp(), optim=name, learning_rate=1e-2, weight_decay=0.1, use_cpu=True, **options
        )
        return Trainer(model, arguments).create_optimizer()

    return make


def own() -> dict[str, Make]:
    kinds = {n: k for n, k in vars(torch.optim).items() if inspect.isclass(k)}
    del kinds["Optimizer"], kinds["SparseAdam"]  # of sparse gradients alone
    found: dict[str, Make] = {name: of(kind) for name, kind in kinds.items()}
    for fused in ("Adam", "AdamW", "SGD", "Adagrad"):
        found[f"{fused} fused"] = of(kinds[fused], fused=True)
    for several in ("Adam", "NAdam", "RMSprop"):
        found[f"{several} foreach"] = of(kinds[several], foreach=True)
    found["AMSGrad"] = of(torch.optim.AdamW, amsgrad=True)
    found["no momentum"] = of(torch.optim.SGD, momentum=0.0)
    found["raw writes"] = lambda model: Raw(trained(model))
    found["averaged"] = lambda model: Averaged(trained(model))
    return found


def of_library(name: str) -> dict[str, Make]:
    """Every optimizer class of a library; one that only stands for it where it is missing."""
    try:
        library = importlib.import_module(name)
    except ImportError:
        return {name: lambda _: pytest.importorskip(name)}
    if name == "bitsandbytes":
        library = library.optim
    kinds = {n: k for n, k in vars(library).items() if inspect.isclass(k)}
    return {
        f"{name} {n}": of(kind)
        for n, kind in kinds.items()
        if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }


LIBRARIES = ("pytorch_optimizer", "bitsandbytes", "schedulefree", "galore_torch")
OPTIMIZERS = {
    **own(),
    **{f"Trainer {name.value}": of_trainer(name.value) for name in OptimizerNames},
    **{name: make for library in LIBRARIES for name, make in of_library(library).items()},
}


def steps(model: nn.Module, make: Make, each: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(7)
    optimizer = make(model.train())
    ids = tokens()

    @torch.enable_grad()
    def closure() -> Tensor:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(STEPS):
        optimizer.step(closure)
        each(model)
    if hasattr(optimizer, "eval"):  # what it has trained is another mean of its steps
        optimizer.eval()


def peft_model(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_peft_model(("q_proj", "o_proj", "down_proj"), lora_bias=False).to(dtype)


def measure_and_save(model: nn.Module) -> None:
    model.state_dict()
    gk.leakage(model)
    model.get_base_model().model.layers[0].mlp.down_proj.get_delta_weight("default")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closure_holds(name: str) -> None:
    make = OPTIMIZERS[name]
    stock = peft_model()
    try:
        steps(stock, make, lambda _: None)
    except Exception as error:
        pytest.skip(f"stock peft does not train with it here: {str(error)[:200]}")
    ends = []
    for each in (lambda _: None, measure_and_save):
        model = peft_model()
        subspace = a_subspace(model)
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
        steps(model, make, each)
        ends.append(model)
    plain, watched = ends
    for (key, one), other in zip(plain.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other), key
    saved = {k: v for k, v in plain.state_dict().items() if "lora_" in k}
    stock.load_state_dict(saved, strict=False)
    assert max(gk.leakage(stock, subspace).values()) <= 1e-6
    assert_same_logits(logits(plain), logits(stock), stock)


def test_in_bfloat16_the_rounding_is_left() -> None:
    for make in (of(torch.optim.AdamW), lambda model: Raw(trained(model))):
        model = peft_model(torch.bfloat16)
        subspace = a_subspace(model)
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
        steps(model, make, lambda _: None)
        stock = get_peft_model(tiny_model().bfloat16(), model.peft_config["default"])
        stock.to(torch.bfloat16)
        set_peft_model_state_dict(
            stock, {k.replace(".default", ""): v for k, v in model.state_dict().items()}
        )
        assert max(gk.leakage(stock, subspace).values()) <= 2**-9
        rounding = relative_error(logits(stock).float(), logits(copy.deepcopy(stock).float()))
        assert relative_error(logits(model).float(), logits(stock).float()) <= 2 * rounding
