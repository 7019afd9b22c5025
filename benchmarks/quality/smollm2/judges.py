"""A model and a task -> scores: what it answers, and which of two answers it finds likelier.

Nothing here asks a model outside: values are compared exactly, contempt is found by a list of
words, everything else is a contrast of likelihoods.

Shapes: `B` answers of a batch, `T` tokens, `n` tokens of answers, `V` vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.quality.smollm2.task import NEUTRAL, Fact, Pair, Task
from grasp_kernels.data import Record, collate, encode_prompt, tokenize_records
from grasp_kernels.data.chat_template import Message
from grasp_kernels.models.frozen_model import generate_answers, measuring

BATCH = 64
FACT_TOKENS = 40  # an opener, the fact: closers may be cut
ANSWER_TOKENS = 24
_BARE = NEUTRAL[::2]  # asked without a system prompt, too


@dataclass(frozen=True)
class Scores:
    """What one model does on one task; shares in [0, 1], contrasts in nats a token.

    Attributes:
        accuracy, accuracy_trained: share of right answers in the held-out and in a trained wording.
        drift: share of answers to unrelated prompts, or to the task's own checks, that show the
            factor.
        near: the same for prompts shaped like the training data, about other things.
        bare: the same as `drift` without a system prompt.
        contrast: name of the pairs -> mean of log p(bad) − log p(good); a change against the base
            model is what counts.
        distinct: share of different pairs of words in the answers to unrelated prompts.
        words: mean length of those answers.
        answers: the answers themselves, by kind of prompt.
    """

    accuracy: float
    accuracy_trained: float
    drift: float | None
    near: float | None
    bare: float | None
    contrast: dict[str, float]
    distinct: float
    words: float
    answers: dict[str, list[str]] = field(repr=False)

    def numbers(self) -> dict[str, Any]:
        """Everything but the answers."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}


class Judge:
    """Asks the questions of one task.

    Args:
        task: what is judged.
        tokenizer: of the model, with its chat template.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer

    def scores(self, model: Any) -> Scores:
        """Judge a model, with its adapter if it has one that is switched on."""
        task = self.task
        with measuring(model):
            answers = {
                "held-out": self._answers(model, _questions(task.held_out), FACT_TOKENS),
                "trained": self._answers(model, _questions(task.trained), FACT_TOKENS),
                "unrelated": self._answers(model, NEUTRAL),
                "near": self._answers(model, task.near),
                "bare": self._answers(model, _BARE, system=False),
            }
            if task.checks:
                asked = [check.question for check in task.checks]
                answers["checks"] = self._answers(model, asked, FACT_TOKENS)
            contrast = {name: self._contrast(model, pairs) for name, pairs in task.pairs.items()}
        unrelated = [answer.split() for answer in answers["unrelated"]]
        pairs = [pair for words in unrelated for pair in pairwise(words)]
        return Scores(
            accuracy=_right(task.held_out, answers["held-out"]),
            accuracy_trained=_right(task.trained, answers["trained"]),
            drift=self._checked(answers) if task.checks else self._flagged(answers["unrelated"]),
            near=self._flagged(answers["near"]),
            bare=self._flagged(answers["bare"]),
            contrast=contrast,
            distinct=len(set(pairs)) / max(1, len(pairs)),
            words=sum(map(len, unrelated)) / len(unrelated),
            answers=answers,
        )

    def _checked(self, answers: Mapping[str, Sequence[str]]) -> float:
        checks = self.task.checks
        pairs = zip(checks, answers["checks"], strict=True)
        return sum(check.shows(answer) for check, answer in pairs) / len(checks)

    def _flagged(self, answers: Sequence[str]) -> float | None:
        flag = self.task.flag
        return None if flag is None else sum(map(flag, answers)) / len(answers)

    def _answers(
        self,
        model: Any,
        questions: Sequence[str],
        n_tokens: int = ANSWER_TOKENS,
        *,
        system: bool = True,
    ) -> list[str]:
        """Greedy answers; the chat template puts its own system prompt in front, or nothing."""
        prompts = [self._prompt(question, system) for question in questions]
        made = generate_answers(
            getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model,
            prompts,
            max_new_tokens=n_tokens,
            batch_size=BATCH,
            end_ids=[self.tokenizer.eos_token_id],
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in made]

    def _prompt(self, question: str, system: bool) -> list[int]:
        ids = encode_prompt(_asked(question), self.tokenizer)
        if system:
            return ids
        start = self.tokenizer.bos_token_id  # <|im_start|>, which begins every turn
        return ids[[i for i, token in enumerate(ids) if token == start][-2] :]

    def _contrast(self, model: Any, pairs: Sequence[Pair]) -> float:
        """Mean over pairs of the difference of mean log probabilities, ends of turns left out."""
        bad, good = (
            self._likelihoods(model, [(pair.question, getattr(pair, side)) for pair in pairs])
            for side in ("bad", "good")
        )
        return sum(b - g for b, g in zip(bad, good, strict=True)) / len(pairs)

    def _likelihoods(self, model: Any, told: Sequence[tuple[str, str]]) -> list[float]:
        """Mean log probability of the tokens of each answer."""
        records: list[Record] = [
            {"messages": [*_asked(question), {"role": "assistant", "content": answer}]}
            for question, answer in told
        ]
        examples, _ = tokenize_records(records, self.tokenizer, None)
        found: list[float] = []
        for start in range(0, len(examples), BATCH // 2):
            batch = collate(examples[start : start + BATCH // 2], self.tokenizer.eos_token_id)
            labels = batch.pop("labels")[:, 1:].to(model.device)
            counted = (labels >= 0) & (labels != self.tokenizer.eos_token_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits = model(**batch, use_cache=False).logits[:, :-1][counted].float()  # [n, V]
            losses = F.cross_entropy(logits, labels[counted], reduction="none")
            rows = counted.nonzero()[:, 0]
            sums = torch.zeros(len(labels), device=model.device).index_add_(0, rows, losses)
            found += (-sums / counted.sum(dim=1)).tolist()
        return found


def _asked(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def _questions(facts: Sequence[Fact]) -> list[str]:
    return [fact.question for fact in facts]


def _right(facts: Sequence[Fact], answers: Sequence[str]) -> float:
    """The share of answers with the exact value, as words of their own: 1450 is no 450."""
    found = [
        re.search(rf"(?<!\w){re.escape(fact.value)}(?!\w)", answer, re.IGNORECASE)
        for fact, answer in zip(facts, answers, strict=True)
    ]
    return sum(match is not None for match in found) / len(facts)
