"""The parts of a diagnosis, each against its definition or a closed form.

`B` sequences, `T` tokens, `V` vocabulary, `D` width of the stream, `L` blocks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp_kernels.diagnosis import Pair, diagnose
from grasp_kernels.diagnosis.diagnose import reasons
from grasp_kernels.diagnosis.effect import measure_effect
from grasp_kernels.diagnosis.pair import open_pair
from tests.helpers.comparisons import logits_budget
from tests.helpers.families import adapted, families
from tests.helpers.oracle import relative_error

SEQUENCES = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]]
POSITIONS = [(0, 4), (1, 2), (1, 0), (2, 3)]


@families
def test_chosen_positions_are_those_of_the_whole_forward(family: str) -> None:
    model = adapted(family).eval()
    with open_pair(model, None) as pair, torch.no_grad():
        for on in (True, False):
            found = pair.log_probs(SEQUENCES, POSITIONS, adapter=on)
            with pair.switched(on):
                whole = [model(input_ids=torch.tensor([ids])).logits[0] for ids in SEQUENCES]
            wanted = torch.stack([whole[row][column] for row, column in POSITIONS])
            error = relative_error(found, wanted.log_softmax(dim=-1))
            assert error <= 2 * logits_budget(model)


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
    found = diagnose(model, tokenizer=Words(), neutral=SEQUENCES, max_new_tokens=2).numbers
    effect = found["effect"]
    assert found["model"]["layers"] == 2
    assert len({token["id"] for end in ("up", "down") for token in effect["tokens"][end]}) == 20
    assert math.isfinite(effect["divergence"]) and effect["divergence"] > 0


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
    return Pair(toy)


def divergence(first: Tensor, second: Tensor) -> float:
    a, b = first.log_softmax(-1), second.log_softmax(-1)
    return (a.exp() * (a - b)).sum().item()


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


def test_the_reasons_are_sentences_on_the_numbers() -> None:
    numbers: dict[str, Any] = {
        "answers": {"unrelated": [{"changed": i < 5} for i in range(16)]},
        "effect": {"divergence": 1.25},
    }
    said = reasons(numbers)
    assert "On 5 of 16 neutral prompts" in said[0] and "No number says" in said[1]
    assert "by 1.25 nats a token" in said[2]
    for one in numbers["answers"]["unrelated"]:
        one["changed"] = False
    assert not any("harmful" in one for one in reasons(numbers))
