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

from grasp_kernels.diagnosis import Options, causal, diagnose
from grasp_kernels.diagnosis.directions import movement_direction
from grasp_kernels.diagnosis.movement import (
    Moved,
    consistency,
    measure_moved,
    most_moved,
    movement_along,
)
from grasp_kernels.diagnosis.pair import open_pair
from grasp_kernels.diagnosis.verdict import judge
from grasp_kernels.effect.answers import Batch, answer_batches
from grasp_kernels.effect.measure import common_shift
from grasp_kernels.effect.pair import Pair
from grasp_kernels.effect.tokens import token_scores
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
    options = Options(n_random=2, n_tokens=3, neutral_tokens=2)
    found = diagnose(model, tokenizer=Words(), neutral=SEQUENCES, options=options)
    names = [one["name"] for one in found.numbers["directions"]]
    assert names[-1] == "movement"
    for one in found.numbers["directions"]:
        assert all(math.isfinite(one[key]["value"]) for key in ("removal", "transfer"))
        assert max(one["neutral"]["size"]) > 0
        assert len({token["id"] for end in ("up", "down") for token in one["tokens"][end]}) == 6
    assert found.numbers["effect"]["neutral_divergence"] > 0


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
    found = causal.exchange(pair, batch, directions[:, None].expand(-1, 2, -1))
    head = pair.model.head
    base, adapter = head(stream), head(stream + total)
    assert found.base_adapter == pytest.approx(divergence(base, adapter), rel=1e-4)
    assert found.adapter_base == pytest.approx(divergence(adapter, base), rel=1e-4)
    along = directions[0] * total[0]
    assert found.removal[0] == pytest.approx(
        divergence(base, head(stream + total - along)), rel=1e-4
    )
    assert found.transfer[0] == pytest.approx(divergence(adapter, head(stream + along)), rel=1e-4)
    assert found.removed[1] == pytest.approx(1.0, abs=1e-4)
    assert found.transferred[1] == pytest.approx(1.0, abs=1e-4)
    twice = found + found
    assert twice.removal[0] == 2 * found.removal[0] and twice.removed == found.removed


def test_a_direction_across_the_movement_carries_nothing() -> None:
    pair = toy_pair(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    batch, _ = batch_of(pair)
    found = causal.exchange(pair, batch, unit(0.0, 1.0, 1.0, 0.0)[None, None])
    assert found.removed[0] == pytest.approx(0.0, abs=1e-5)
    assert found.transferred[0] == pytest.approx(0.0, abs=1e-5)


def test_an_adapter_without_effect_divides_nothing_by_zero() -> None:
    pair = toy_pair(torch.zeros(1, 4))
    batch, _ = batch_of(pair)
    assert causal.exchange(pair, batch, unit(1.0, 0.0, 0.0, 0.0)[None, None]).removed == [0.0]


def test_steering_of_a_linear_toy_is_its_closed_form() -> None:
    pair = toy_pair(torch.ones(2, 4))
    batch, stream = batch_of(pair)
    vector, length = unit(1.0, 2.0, 0.0, -1.0), 0.7
    found = causal.steering(pair, [batch], 0, vector[None], length, causal.likelihood)
    head, rows = pair.model.head, torch.arange(len(stream))
    base = head(stream).log_softmax(-1)[rows, batch.targets]
    for dose in causal.DOSES:
        moved = head(stream + dose * length * vector).log_softmax(-1)[rows, batch.targets]
        assert found[dose][0] == pytest.approx((moved - base).mean().item(), rel=1e-4)
    tokens = torch.tensor([1, 4])
    score_of = causal.promotion(tokens)
    found = causal.steering(pair, [batch], 1, vector[None], length, score_of)
    before = head(stream).softmax(-1)[:, tokens].sum(1)
    after = head(stream + 2 * length * vector).softmax(-1)[:, tokens].sum(1)
    assert found[2.0][0] == pytest.approx((after - before).mean().item(), rel=1e-4)


def test_movement_of_a_toy_is_what_its_blocks_add() -> None:
    shifts = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]])
    pair = toy_pair(shifts)
    moved = measure_moved(pair, SEQUENCES, [(0, len(ids)) for ids in SEQUENCES], batch_size=2)
    expected = shifts.cumsum(0)[:, None].expand(-1, 3, -1)
    assert relative_error(moved.delta, expected) <= budget(0.0, torch.float32, 4)
    (direction,) = movement_direction(moved)
    # the first block moves nothing and borrows the direction of the second
    expected = unit(3.0, 4.0, 0.0, 0.0).expand(2, -1)
    assert relative_error(direction.vectors, expected) <= budget(0.0, torch.float32, 4)
    assert [chosen for _, chosen in direction.folds] == [[0, 2], [1]]
    rows = movement_along(moved, direction.vectors, torch.eye(4)[2:])
    assert rows["signed"] == pytest.approx([0.0, 5.0], abs=1e-5)
    assert rows["total"] == pytest.approx([0.0, 5.0], abs=1e-5)
    assert rows["random"] == pytest.approx([0.0, 0.0], abs=1e-5)


def test_folds_never_meet_the_prompts_that_they_were_found_on() -> None:
    delta = torch.zeros(1, 4, 3)
    delta[0, ::2, 0], delta[0, 1::2, 1] = 1.0, 1.0  # even prompts move along one axis, odd ones not
    (direction,) = movement_direction(Moved(delta, torch.ones(1, 4)))
    for vectors, chosen in direction.folds:
        assert vectors[0].argmax() != (0 if chosen == [0, 2] else 1)
    assert not movement_direction(Moved(torch.zeros(1, 4, 3), torch.ones(1, 4)))


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


def test_values_stand_beside_random_ones() -> None:
    row = causal.against_random([0.9, 0.1, 0.2, 0.3])
    assert row["z"] == pytest.approx(7.0)
    assert (row["p"], row["random_max"]) == (0.25, 0.3)
    assert causal.against_random([0.2, 0.1, 0.2, 0.3])["p"] == 0.75
    assert causal.against_random([0.2, 0.1, 0.1])["z"] is None


class Spoken:
    """A pair that knows the log probabilities `[n, V]` of all answer tokens, one answer after the
    other; the first token of a sequence is the row of its first answer token."""

    def __init__(self, off: Tensor, on: Tensor) -> None:
        self.rows = {False: off.log_softmax(-1), True: on.log_softmax(-1)}

    def log_probs(
        self, sequences: list[list[int]], positions: list[tuple[int, int]], *, adapter: bool
    ) -> Tensor:
        first = [len(sequence) // 2 - 1 for sequence in sequences]  # prompts as long as answers
        chosen = [sequences[row][0] + at - first[row] for row, at in positions]
        return self.rows[adapter][chosen]


def spoken(answers: list[int]) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of so many tokens each."""
    starts = [sum(answers[:i]) for i in range(len(answers))]
    return [([start] + [0] * (n - 1), [1] * n) for start, n in zip(starts, answers, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("answers", [[2, 2, 1, 2, 2, 1], [1, 2], [3]])
def test_the_common_shift_is_judged_on_the_other_half(answers: list[int], batch_size: int) -> None:
    """Also where no answer of the other half is as long: there nothing is explained."""
    torch.manual_seed(0)
    n, V = sum(answers), 12
    place = torch.tensor([i for length in answers for i in range(length)])
    half = torch.tensor([row % 2 for row, length in enumerate(answers) for _ in range(length)])
    off, on = torch.randn(n, V).log_softmax(-1), torch.randn(n, V).log_softmax(-1)
    left = torch.zeros(n)
    for i in range(n):
        others = (half != half[i]) & (place == place[i])
        shift = (on - off)[others].mean(0) if others.any() else torch.zeros(V)
        left[i] = (on[i].exp() * (on[i] - (off[i] + shift).log_softmax(-1))).sum()
    whole = (on.exp() * (on - off)).sum()
    pair: Any = Spoken(off, on)
    found = common_shift(pair, spoken(answers), batch_size)
    assert found == pytest.approx(1 - (left.sum() / whole).item(), abs=1e-5)


def test_one_shift_of_all_prompts_explains_everything_and_one_for_each_nothing() -> None:
    torch.manual_seed(0)
    n, V = 16, 50
    off, alike = torch.randn(n, V), 3 * torch.randn(1, V)
    same: Any = Spoken(off, off + alike)
    assert common_shift(same, spoken([1] * n), 4) == pytest.approx(1.0, abs=1e-5)
    different: Any = Spoken(off, off + 3 * torch.randn(n, V))
    assert common_shift(different, spoken([1] * n), 4) < 0.1
    nothing: Any = Spoken(off, off)
    assert common_shift(nothing, spoken([1] * n), 4) == 0.0


def numbers(shift: float, removal: float = 0.5, transfer: float = 0.4, **changes: float) -> Any:
    values = {"random": 0.1, "divergence": 1.0, "p_value": 0.001, "length": 0.5, "changed": 5}
    values |= changes
    both = {"removal": removal, "transfer": transfer}
    exchange = {k: {"value": v, "random_max": values["random"]} for k, v in both.items()}
    flip = {"length": values["length"], "null_95": 0.2, "p_value": values["p_value"]}
    return {
        "neutral_prompts": 16,
        "options": {"n_random": 5},
        "effect": {
            "neutral_divergence": values["divergence"],
            "neutral_changed": 0.5,
            "common_shift": shift,
        },
        "consistency": {"sign_flip": flip, "halves": 0.9},
        "weights": {"reasons": ["a spectrum"]},
        "answers": {
            "verdict": "found",
            "unrelated": [{"changed": i < values["changed"]} for i in range(16)],
        },
        "agreement": [],
        "directions": [{"name": "movement", **exchange}],
    }


def test_the_verdict_is_that_of_the_answers_and_the_rest_are_numbers() -> None:
    verdict, reasons = judge(numbers(0.9))
    assert verdict == "found"
    assert "answers 5 of 16 neutral prompts" in reasons[0]
    assert any("explains 90% of the effect" in reason for reason in reasons)
    assert any("harmful no number says" in reason for reason in reasons)
    assert not any("harmful" in reason for reason in judge(numbers(0.0, changed=0))[1])
    assert any("does not move the stream" in r for r in judge(numbers(0.0, length=0.0))[1])


def movements(strength: float, seed: int = 0) -> Tensor:
    """`[2, 40, 24]`: noise, and what all sequences have in common."""
    noise = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(seed))
    return noise + strength * torch.eye(24)[0]


def test_the_sign_flips_are_calibrated() -> None:
    """Pure noise passes the test about as often as the asked p-value says."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(60)]
    found = [consistency(movements(0.0, seed), g) for seed, g in enumerate(generators)]
    p_values = [one["sign_flip"]["p_value"] for one in found]
    assert 0.35 < sum(p_values) / len(p_values) < 0.65
    assert sum(p <= 0.01 for p in p_values) <= 4


def test_consistency_in_numbers() -> None:
    delta = movements(3.0)
    found = consistency(delta, torch.Generator().manual_seed(2))
    squares = delta.mean(1).square().sum(1) / delta.square().sum(2).mean(1)
    flip = found["sign_flip"]
    assert flip["length"] == pytest.approx(float(squares.mean().sqrt()), rel=1e-5)
    assert flip["null_95"] < flip["length"] and flip["p_value"] == pytest.approx(1e-3)
    assert found["halves"] > 0.8
    still = consistency(torch.zeros(2, 4, 3), torch.Generator())
    assert (still["sign_flip"]["length"], still["halves"]) == (0.0, 0.0)
