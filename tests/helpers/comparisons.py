"""Outputs and gradients of tiny models, and how far two of them may be apart."""

import copy

import torch
from torch import Tensor

from tests.helpers.models import tokens
from tests.helpers.oracle import budget, relative_error


def loss_and_gradients(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the tiny tokens, with the gradient of every parameter that has one."""
    ids = tokens().to(next(model.parameters()).device)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each within 1e-5 of its own length."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = torch.linalg.vector_norm(found[name] - gradient)
        assert error <= 1e-5 * torch.linalg.vector_norm(gradient), name


def logits(model: torch.nn.Module) -> Tensor:
    """Of the tiny tokens, in evaluation."""
    with torch.no_grad():
        ids = tokens().to(next(model.parameters()).device)
        return model.eval()(input_ids=ids).logits


def assert_same_logits(found: Tensor, expected: Tensor, stock: torch.nn.Module) -> None:
    """Two computations in float32 of what `stock` computes, each within the budget of rounding that
    `stock` itself has beside float64."""
    assert relative_error(found, expected) <= 2 * logits_budget(stock)


def logits_budget(stock: torch.nn.Module) -> float:
    """What float32 may cost the logits of `stock`, from what it does cost beside float64."""
    wide = copy.deepcopy(stock).double()
    wide.get_base_model().set_experts_implementation("eager")  # the grouped one has no float64
    own, oracle = logits(stock), logits(wide)
    longest = max(size for parameter in stock.parameters() for size in parameter.shape)
    return budget(relative_error(own, oracle), torch.float32, longest)


def total_error(found: dict[str, Tensor], oracle: dict[str, Tensor]) -> float:
    """Relative error of all gradients together, in float64."""
    assert found.keys() == oracle.keys()
    error = sum(float((found[n].double() - g.double()).square().sum()) for n, g in oracle.items())
    return (error / sum(float(g.double().square().sum()) for g in oracle.values())) ** 0.5
