"""LoRA layers over a base product that is computed elsewhere: by a stand-in, and by the libraries.

The stand-in is always there. Of bitsandbytes and torchao those are tested that are installed; sizes
are multiples of 64, the number of weights that share a scale.
"""

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import grasp_kernels as gk
from grasp_kernels.layers import quantised
from grasp_kernels.layers.projected import ProjectedLoRA
from grasp_kernels.ops.lora_linear.registry import computes
from tests.helpers.backends import everywhere
from tests.helpers.comparisons import loss_and_gradients, total_error
from tests.helpers.models import (
    ALL_LINEAR,
    SIZES,
    a_subspace,
    randomise_adapter,
    tiny_model,
    tokens,
)
from tests.helpers.oracle import budget, orthonormal, relative_error
from tests.helpers.scripts import run_example

pytest_plugins = ("tests.helpers.runs",)


class Product(torch.autograd.Function):
    """`X Wᵀ` of a library that needs its result again: who changes it in place is found out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight.mT
        ctx.save_for_backward(weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        weight, _ = ctx.saved_tensors
        return dy[0] @ weight, None


class EightBits(nn.Linear):
    """A stand-in for a library's layer: whole numbers up to 127, and a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        numbers = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x, (self.weight * self.scale).to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class StandIn(lora.Linear):
    """peft's layer over such a weight."""


LIBRARIES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao"}
KINDS = ["stand-in", *LIBRARIES]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint as wide as quantisation asks for."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setitem(SIZES, name, size)
        model = tiny_model()
    path = tmp_path_factory.mktemp("quantised") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def known_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantised._LIBRARIES, __name__, "a stand-in")


def base_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint with the linear layers of its blocks quantised."""
    if kind in LIBRARIES:
        pytest.importorskip(LIBRARIES[kind])
    options: dict[str, Any] = {}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif kind == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if kind == "stand-in":
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, EightBits(child))
    return model


def on_peft(base: Any, **options: Any) -> PeftModel:
    """peft's layers over it, in training mode: bitsandbytes lays weights out anew in evaluation."""
    config = LoraConfig(r=16, target_modules=list(ALL_LINEAR), **options)
    model = get_peft_model(base, config)
    for module in model.modules():
        if type(module) is lora.Linear and isinstance(module.base_layer, EightBits):
            module.__class__ = StandIn
    randomise_adapter(model)
    return model.train()


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, lora.LoraLayer)]


@everywhere
@pytest.mark.parametrize("project", ["residual", "weights"])
@pytest.mark.parametrize("closed", [True, False])
def test_it_is_the_layer_over_the_dequantised_weight(
    project: str, closed: bool, backend: str, device: str
) -> None:
    dtype = torch.float32 if computes(backend, torch.float32) else torch.bfloat16
    linear = nn.Linear(48, 40)
    eight = EightBits(linear)
    linear.weight.data = eight.weight * eight.scale
    linear.to(dtype).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, lora_bias=True)
    g = torch.Generator().manual_seed(0)
    basis = orthonormal(40, 3, g)
    x, dy = torch.randn(2, 33, 48, generator=g), torch.randn(2, 33, 40, generator=g)
    results = []
    for base, ours in ((linear, gk.GraspLoRALinear), (eight, quantised.quantised(StandIn))):
        layer = lora.Linear(base, "default", config, r=4, lora_alpha=8).float()
        randomise_adapter(layer)
        for parameter in (base.weight, base.bias):
            parameter.data = parameter.data.to(dtype if parameter.is_floating_point() else None)
        layer.to(device).train()
        ours.adopt(layer, basis, project, closed, backend)
        leaf = x.to(device, dtype).requires_grad_()
        assert layer.why_stock(leaf) is None
        torch.manual_seed(3)
        y = layer(leaf)
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        wanted = [leaf, *factors, layer.lora_B["default"].bias]
        results.append([y, *torch.autograd.grad(y, wanted, dy.to(device, dtype))])
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.dtype == expected.dtype
        assert relative_error(found.detach(), expected.detach()) <= 4 * torch.finfo(dtype).eps


@every_kind
def test_several_steps_are_those_of_peft(kind: str, folder: Path) -> None:
    runs = []
    for ours in (False, True):
        model = on_peft(base_model(kind, folder))
        if ours:
            report = gk.apply_grasp(model)
            assert len(report.replaced) == 14
            library = LIBRARIES.get(kind, "a stand-in")
            assert f"base product by {library}" in str(report)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(4):
            loss, gradients = loss_and_gradients(model)
            optimizer.step()
            losses.append(loss)
        assert losses[-1] < losses[0]
        runs.append((torch.stack(losses), gradients))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-5, atol=0.0)
    assert total_error(runs[1][1], runs[0][1]) <= 1e-3


def dequantised(model: PeftModel) -> PeftModel:
    """The same adapter over the weights that the layers multiply with, in float64."""
    config = model.get_base_model().config
    plain = AutoModelForCausalLM.from_config(type(config)(**{k: getattr(config, k) for k in SIZES}))
    oracle = get_peft_model(plain, LoraConfig(r=16, target_modules=list(ALL_LINEAR))).double()
    ours = dict(model.named_modules())
    with torch.no_grad():
        for name, module in oracle.named_modules():
            source = ours[name]
            if name.endswith("base_layer"):
                dtype = source.bias.dtype if source.bias is not None else None
                one = torch.eye(source.in_features, dtype=dtype, requires_grad=True)
                module.weight.copy_(source(one).mT)
                continue
            for own, parameter in module.named_parameters(recurse=False):
                parameter.copy_(getattr(source, own))
    return oracle.train()


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)],
)
def test_half_precision_is_within_budget(
    kind: str, dtype: torch.dtype, autocast: bool, folder: Path
) -> None:
    model = on_peft(base_model(kind, folder, dtype))
    ratios = []
    for seed in range(5):
        randomise_adapter(model, seed)
        _, oracle = loss_and_gradients(dequantised(model))
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            _, stock = loss_and_gradients(model)
            gk.apply_grasp(model)
            _, found = loss_and_gradients(model)
            gk.remove_grasp(model)
        assert {g.dtype for g in found.values()} == {torch.float32}
        oracle = {name: oracle[name] for name in found}
        ratios.append(total_error(found, oracle) / total_error(stock, oracle))
    assert median(ratios) <= 1.5


@every_kind
def test_the_projection_is_that_of_the_stock_path(kind: str, folder: Path) -> None:
    """peft's own forward with its gradient projected, which is what runs where we cannot."""
    model = on_peft(base_model(kind, folder))
    report = gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    assert len(report.projected) == 4
    _, found = loss_and_gradients(model)
    for layer in layers(model):
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
        assert layer.why_stock(torch.zeros(1, 64)) == "a child module has hooks"
    with pytest.warns(UserWarning, match="not accelerated: a child module has hooks"):
        _, expected = loss_and_gradients(model)
    assert total_error(found, expected) <= 1e-3
    unprojected = on_peft(base_model(kind, folder))
    assert total_error(loss_and_gradients(unprojected)[1], expected) > 1e-1


@every_kind
def test_training_as_for_qlora(kind: str, folder: Path, tmp_path: Path) -> None:
    """Checkpointing, float32 norms, dropout, AdamW: closed to the end, and loaded by stock peft."""
    base = prepare_model_for_kbit_training(base_model(kind, folder))
    model = on_peft(base, lora_dropout=0.1)
    subspace = a_subspace(model)
    names = set(model.state_dict())
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    losses = []
    for _ in range(10):
        loss, _ = loss_and_gradients(model)
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert max(gk.leakage(model).values()) <= 1e-6
    for layer in layers(model):
        if layer.write_basis is not None:
            delta = layer.get_delta_weight("default")
            assert (layer.write_basis.mT @ delta).norm() <= 1e-5 * delta.norm()

    model.save_pretrained(tmp_path / "adapter")
    assert set(model.state_dict()) == names
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens()).logits
    gk.remove_grasp(model)
    assert not any(isinstance(module, ProjectedLoRA) for module in model.modules())
    kinds = {type(layer).__name__ for layer in layers(model)}
    assert kinds <= {"StandIn", "Linear4bit", "Linear8bitLt", "TorchaoLoraLinear"}
    with torch.no_grad():
        restored = model(input_ids=tokens()).logits
    # Two computations in float32, each with what its sums round.
    longest = max(max(layer.in_features, layer.out_features) for layer in layers(model))
    rounding = 2 * budget(0.0, torch.float32, longest)
    assert relative_error(restored, expected) <= rounding
    stock = PeftModel.from_pretrained(base_model(kind, folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert relative_error(stock(input_ids=tokens()).logits, expected) <= rounding


@pytest.mark.slow
def test_kernels_beside_a_library(folder: Path) -> None:
    model = on_peft(base_model("stand-in", folder))
    subspace = a_subspace(model)
    results = []
    for backend in ("aten", "triton"):
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, backend=backend))
        results.append(loss_and_gradients(model)[1])
    assert total_error(results[1], results[0]) <= 1e-5


class Rounded(torch.autograd.Function):
    """`X Wᵀ` whose backward leaves out that the input is scaled by its largest element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        ctx.save_for_backward(x, weight)
        return (x / scale).round() * scale @ weight.mT

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        largest = x.abs() == x.abs().amax(-1, keepdim=True)
        through_scale = (dy[0] * (x @ weight.mT)).sum(-1, keepdim=True) / x.abs().amax()
        return largest * x.sign() * through_scale, None


class Straight(Rounded):
    """The same, and its backward that of the product."""

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        return dy[0] @ ctx.saved_tensors[1], None


class WithoutBackward(EightBits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class WithHalf(EightBits):
    """Right but for what a part of the output gives back."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        half = y.shape[-1] // 2
        return torch.cat([y[..., :half], y[..., half:].detach()], -1)


class OfTheLargest(EightBits):
    product: Any = Rounded

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight * self.scale).to(x.dtype)
        return self.product.apply(x, weight) + self.bias.to(x.dtype)


class OfTheInput(OfTheLargest):
    product = Straight


def over(base: nn.Module, stand_in: bool = True) -> PeftModel:
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"]))
    if stand_in:
        model.base_model.model[0].__class__ = StandIn
    return model


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (WithoutBackward, "no gradient"),
        (OfTheLargest, "a gradient that is"),
        (WithHalf, "a gradient that is"),
    ],
)
def test_a_base_product_without_a_right_gradient_is_not_accelerated(kind: Any, found: str) -> None:
    """Whoever knows the layer: a library that we know, or a class that nobody does."""
    for stand_in in (True, False):
        model = over(kind(nn.Linear(64, 48)), stand_in)
        message = f"1 of 1 .*{kind.__name__} over a Parameter, passes back {found}.*weights alone"
        with pytest.warns(UserWarning, match=message):
            report = gk.apply_grasp(model)
        assert not report.replaced
        assert [found in reason for reason in report.fallbacks.values()] == [True]
    linear = nn.Linear(64, 48)
    quantised_forward = kind(linear).forward
    linear.forward = lambda x: quantised_forward(x)  # as compressed-tensors does
    with pytest.warns(UserWarning, match=found):
        gk.apply_grasp(over(linear, stand_in=False))


def test_a_rounded_input_with_the_gradient_of_the_product_is_right() -> None:
    report = gk.apply_grasp(over(OfTheInput(nn.Linear(64, 48))))
    assert report.replaced == ["0"]


def test_torchao_with_rounded_activations() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for config, right in (
        (quantization.Int8WeightOnlyConfig(), True),
        (quantization.Int8DynamicActivationInt8WeightConfig(), False),
    ):
        base = nn.Sequential(nn.Linear(128, 64)).requires_grad_(False)
        quantization.quantize_(base, config)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
        with nullcontext() if right else pytest.warns(UserWarning, match="passes back"):
            report = gk.apply_grasp(model)
        assert (len(report.replaced), len(report.fallbacks)) == (right, not right)


def test_a_pickle_of_a_layer_over_quantised_weights() -> None:
    model = over(EightBits(nn.Linear(64, 48)))
    gk.apply_grasp(model)
    other, x = pickle.loads(pickle.dumps(model)), torch.randn(3, 64)
    assert torch.equal(other(x), model(x))
    assert type(other.base_model.model[0]) is quantised.quantised(StandIn)
    assert type(other.base_model.model[0]).__name__ == "StandIn"


def test_where_peft_computes(folder: Path) -> None:
    model = on_peft(base_model("stand-in", folder))
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    (layer, *_), x = layers(model), torch.randn(2, 64)
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.why_stock(x, adapter_names=["default"]) == "extra arguments ['adapter_names']"
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(ALL_LINEAR)))
    model.base_model.set_adapter(["default", "other"])
    assert layer.why_stock(x) == "2 active adapters"
    model.set_adapter("other")
    assert layer.why_stock(x) is None
    assert layer.closed_adapters == {"default"}


def test_a_copy_is_one_of_its_own(folder: Path) -> None:
    model = on_peft(base_model("stand-in", folder))
    gk.apply_grasp(model)
    twin = copy.deepcopy(model)
    assert total_error(loss_and_gradients(twin)[1], loss_and_gradients(model)[1]) == 0.0
    gk.remove_grasp(twin)
    assert {type(layer) for layer in layers(twin)} == {StandIn}
    assert {type(layer) for layer in layers(model)} == {quantised.quantised(StandIn)}


@pytest.mark.slow
def test_the_example(tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    gk.Subspace(torch.eye(32)[:, :1]).save(tmp_path / "one.safetensors")
    arguments = (tiny_model_dir, chat_jsonl, tmp_path / "adapter")
    out = run_example("qlora.py", *arguments, "--subspace", tmp_path / "one.safetensors")
    assert "base product by bitsandbytes" in out
    assert float(out.split("largest share of an update along the subspace: ")[1]) <= 1e-6
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.isfinite(stock(input_ids=torch.arange(6)[None]).logits).all()
