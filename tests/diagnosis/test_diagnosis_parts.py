"""The parts of a diagnosis, each against its definition or a closed form.

`B` sequences, `T` tokens, `V` vocabulary, `D` width of the stream, `L` blocks, `M` records.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp_kernels.diagnosis import Options, Pair, diagnose
from grasp_kernels.diagnosis.answers import Batch, answer_batches
from grasp_kernels.diagnosis.diagnose import reasons
from grasp_kernels.diagnosis.effect import measure_effect, token_scores
from grasp_kernels.diagnosis.exchange import exchange, measure_exchange
from grasp_kernels.diagnosis.movement import (
    Direction,
    Moved,
    mean_direction,
    measure_moved,
    most_moved,
)
from grasp_kernels.diagnosis.pair import open_pair
from grasp_kernels.models.architectures import RULES
from tests.helpers.comparisons import logits_budget
from tests.helpers.families import adapted, families, tiny
from tests.helpers.oracle import budget, relative_error

SEQUENCES = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]]
POSITIONS = [(0, 4), (1, 2), (1, 0), (2, 3)]


@families
def test_chosen_positions_are_those_of_the_whole_forward(family: str) -> None:
    model = adapted(family).eval()
    with open_pair(model, None) as pair, torch.no_grad():
        assert pair.layers == [0, 1]
        for on in (True, False):
            found = pair.log_probs(SEQUENCES, POSITIONS, adapter=on)
            with pair.switched(on):
                whole = [model(input_ids=torch.tensor([ids])).logits[0] for ids in SEQUENCES]
            wanted = torch.stack([whole[row][column] for row, column in POSITIONS])
            error = relative_error(found, wanted.log_softmax(dim=-1))
            assert error <= 2 * logits_budget(model)


@families
def test_the_lens_is_the_derivative_of_the_logits(family: str) -> None:
    """Exact for a direction across the stream, since there the norm's divisor stands still."""
    model = tiny(family).double()
    direction = torch.randn(32, 1, dtype=torch.float64)
    scores_of = token_scores(model, direction, RULES[family])
    norm = getattr(model.base_model, RULES[family].final_norm)
    stream = torch.randn(32, dtype=torch.float64)
    if RULES[family].norms == "layer":
        stream -= stream.mean()
    across = direction[:, 0] - direction[:, 0].mean() * (RULES[family].norms == "layer")
    stream -= across * (stream @ across) / (across @ across)
    head = model.get_output_embeddings()
    _, derivative = torch.func.jvp(lambda h: head(norm(h)), (stream,), (direction[:, 0],))
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    size = (stream.square().mean() + epsilon).sqrt()  # what the norm divides by
    # The scores are float32, the derivative is not.
    assert relative_error(derivative * size, scores_of[:, 0]) <= budget(0.0, torch.float32, 64)


class Words:
    """As much of a tokenizer as a diagnosis asks for."""

    eos_token_id = 1

    def __len__(self) -> int:
        return 64

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{i}" for i in ids)


@pytest.mark.slow
@families
def test_the_whole_diagnosis_of_every_family(family: str) -> None:
    model = adapted(family, experts=False)
    options = Options(n_random=2, n_listed=3, max_tokens=2)
    found = diagnose(model, tokenizer=Words(), neutral=SEQUENCES, options=options).numbers
    movement = found["movement"]
    assert all(math.isfinite(movement[key]["value"]) for key in ("removal", "transfer"))
    assert len(movement["relative"]) == 2 and max(movement["relative"]) > 0
    assert len({token["id"] for end in ("up", "down") for token in movement["tokens"][end]}) == 6
    assert found["effect"]["divergence"] > 0


class Toy(nn.Module):
    """Embeddings, blocks that add nothing but a constant of the adapter, a linear head."""

    def __init__(self, shifts: Tensor, vocabulary: int = 11) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width = shifts.shape[1]
        self.embedding = nn.Embedding(vocabulary, width)
        self.embedding.weight.data.normal_(generator=generator)
        self.blocks = nn.ModuleList(nn.Identity() for _ in shifts)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight.data.normal_(generator=generator)
        self.shifts, self.on = shifts, True

    def get_base_model(self) -> "Toy":
        return self

    @property
    def base_model(self) -> "Toy":
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        stream = self.embedding(input_ids)
        for block, shift in zip(self.blocks, self.shifts, strict=True):
            stream = block(stream + shift if self.on else stream)
        return SimpleNamespace(logits=self.head(stream))


def toy_pair(shifts: Tensor) -> Pair:
    toy = Toy(shifts).requires_grad_(False)
    return Pair(toy, RULES["llama"], dict(enumerate(toy.blocks)))


def unit(*values: float) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(values), dim=0)


def batch_of(pair: Pair) -> tuple[Batch, Tensor]:
    """Batch of the last tokens, and their stream `[M, D]` in the base model."""
    (batch,) = answer_batches([(ids[:-1], ids[-1:]) for ids in SEQUENCES], 8)
    before = torch.tensor([ids[-2] for ids in SEQUENCES])
    assert batch.targets.tolist() == [5, 6, 8]
    return batch, pair.model.embedding(before)


def divergence(first: Tensor, second: Tensor) -> float:
    a, b = first.log_softmax(-1), second.log_softmax(-1)
    return (a.exp() * (a - b)).sum().item()


def test_exchange_of_a_linear_toy_is_its_closed_form() -> None:
    shifts = torch.tensor([[0.5, 0.1, 0.0, 0.2], [0.3, -0.4, 0.2, 0.0]])
    pair, total = toy_pair(shifts), shifts.sum(dim=0)
    batch, stream = batch_of(pair)
    directions = torch.stack(
        [unit(1.0, 0.0, 0.0, 0.0), torch.nn.functional.normalize(total, dim=0)]
    )
    vectors = directions[:, None].expand(-1, 2, -1)
    there, back = exchange(pair, batch.sequences, batch.positions, vectors)
    head = pair.model.head
    base, adapter = head(stream), head(stream + total)
    along = directions[0] * total[0]
    wanted = [
        [divergence(base, adapter), divergence(base, head(stream + total - along)), 0.0],
        [divergence(adapter, base), divergence(adapter, head(stream + along)), 0.0],
    ]
    torch.testing.assert_close(there, torch.tensor(wanted[0]).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back, torch.tensor(wanted[1]).double(), rtol=1e-4, atol=1e-5)


def exchanged(shift: Tensor, vector: Tensor) -> dict[str, dict[str, float]]:
    """Removal and transfer along one direction, beside the first axis."""
    answers = [(ids[:-1], ids[-1:]) for ids in SEQUENCES]
    vectors = vector[None]
    direction = Direction(vectors, ((vectors, [0, 2]), (vectors, [1])))
    return measure_exchange(toy_pair(shift[None]), answers, direction, torch.eye(4)[:1], 2)


def test_what_a_direction_carries_stands_beside_a_random_one() -> None:
    shift = torch.tensor([0.2, 0.9, 0.0, 0.0])
    for part in exchanged(shift, torch.nn.functional.normalize(shift, dim=0)).values():
        assert part["value"] == pytest.approx(1.0, abs=1e-4)
        assert 0 < part["random_max"] < 0.9
    for part in exchanged(shift, unit(0.0, 0.0, 1.0, 1.0)).values():
        assert part["value"] == pytest.approx(0.0, abs=1e-5)
    for part in exchanged(torch.zeros(4), unit(1.0, 0.0, 0.0, 0.0)).values():
        assert part == {"value": 0.0, "random_max": 0.0}  # nothing is divided by zero


class Eleven(Words):
    def __len__(self) -> int:
        return 11


def test_the_effect_is_the_divergence_of_all_tokens_and_the_tokens_of_the_first() -> None:
    shift = torch.tensor([0.5, 0.1, 0.0, 0.2])
    pair, head = toy_pair(shift[None]), toy_pair(shift[None]).model.head
    own = [(ids[:2], ids[2:]) for ids in SEQUENCES]
    found = measure_effect(pair, Eleven(), own, n_tokens=2, batch_size=2)
    before = torch.tensor([t for ids in SEQUENCES for t in ids[1:-1]])
    stream = pair.model.embedding(before)
    total = divergence(head(stream), head(stream + shift))
    assert found["divergence"] == pytest.approx(total / len(before), rel=1e-4)
    first = pair.model.embedding(torch.tensor([ids[1] for ids in SEQUENCES]))
    change = (head(first + shift).softmax(-1) - head(first).softmax(-1)).mean(0)
    assert [t["id"] for t in found["tokens"]["up"]] == change.topk(2).indices.tolist()
    assert [t["id"] for t in found["tokens"]["down"]] == (-change).topk(2).indices.tolist()


def test_movement_of_a_toy_is_what_its_blocks_add() -> None:
    shifts = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]])
    pair = toy_pair(shifts)
    moved = measure_moved(pair, SEQUENCES, [(0, len(ids)) for ids in SEQUENCES], batch_size=2)
    expected = shifts.cumsum(0)[:, None].expand(-1, 3, -1)
    assert relative_error(moved.delta, expected) <= budget(0.0, torch.float32, 4)
    direction = mean_direction(moved)
    assert direction is not None
    # the first block moves nothing and borrows the direction of the second
    expected = unit(3.0, 4.0, 0.0, 0.0).expand(2, -1)
    assert relative_error(direction.vectors, expected) <= budget(0.0, torch.float32, 4)
    assert [chosen for _, chosen in direction.folds] == [[0, 2], [1]]
    along = moved.relative(direction.vectors) * moved.base.mean(dim=1, keepdim=True)
    assert along.mean(dim=1).tolist() == pytest.approx([0.0, 5.0], abs=1e-5)


def test_folds_never_meet_the_prompts_that_they_were_found_on() -> None:
    delta = torch.zeros(1, 4, 3)
    delta[0, ::2, 0], delta[0, 1::2, 1] = 1.0, 1.0  # even prompts move along one axis, odd ones not
    direction = mean_direction(Moved(delta, torch.ones(1, 4)))
    assert direction is not None
    for vectors, chosen in direction.folds:
        assert vectors[0].argmax() != (0 if chosen == [0, 2] else 1)
    assert mean_direction(Moved(torch.zeros(1, 4, 3), torch.ones(1, 4))) is None


def test_records_are_ranked_by_their_movement() -> None:
    delta = torch.tensor([[[1.0, 0.0], [-3.0, 9.0], [2.0, 0.0]]])
    records: Any = [
        (
            i,
            {
                "messages": [
                    {"role": "user", "content": f"q{i}"},
                    {"role": "assistant", "content": "a"},
                ]
            },
        )
        for i in (1, 5, 9)
    ]
    found = most_moved(Moved(delta, torch.full((1, 3), 2.0)), unit(1.0, 0.0)[None], records, 2)
    assert [(one["record"], one["movement"], one["prompt"]) for one in found] == [
        (9, 1.0, "q9"),
        (1, 0.5, "q1"),
    ]


def test_the_reasons_are_sentences_on_the_numbers() -> None:
    part = {"value": 0.5, "random_max": 0.1}
    numbers: dict[str, Any] = {
        "neutral_prompts": 16,
        "options": {"n_random": 5},
        "answers": {"unrelated": [{"changed": i < 5} for i in range(16)]},
        "effect": {"divergence": 1.25},
        "training_effect": {"divergence": 3.0},
        "movement": {"removal": part, "transfer": part},
    }
    said = reasons(numbers)
    assert "answers 5 of 16 neutral prompts" in said[0] and "harmful no number says" in said[1]
    assert "by 1.25 nats each (3 nats on the training answers)" in said[2]
    assert "loses 50% of its effect" in said[3] and "goes 50% of the way" in said[4]
    for one in numbers["answers"]["unrelated"]:
        one["changed"] = False
    del numbers["movement"], numbers["training_effect"]
    said = reasons(numbers)
    assert not any("harmful" in one or "training" in one for one in said)
    assert said[-1] == "It does not move the stream on neutral prompts at all."
