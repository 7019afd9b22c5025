"""A judge behind an OpenAI-compatible endpoint -> a score from 0 to 100, or why there is none.

Standard library alone. A reply that says nothing (CODE, REFUSAL, no number) is a result; a call
that failed is not: it raises `JudgeFailure` and can be made again.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

LEAST_MASS = 0.25  # of the numbers among the 20 most likely tokens, as in the protocol
_LABELS = ("CODE", "REFUSAL")
_PASSING = {408, 409, 425, 429}  # and all of 500 and above
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # a reply of another form
_PROBED = "57"
_PROBE = f"Reply with the number {_PROBED} and nothing else."


class _StayingThere(urllib.request.HTTPRedirectHandler):
    """Refuses to follow a redirect, which would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_StayingThere)


class JudgeFailure(Exception):
    """One call that failed, after all retries."""


class JudgeRefused(Exception):
    """The endpoint will refuse every call: a wrong key, a wrong model, a wrong address."""


@dataclass(frozen=True)
class Judge:
    """Where to ask; `key` is sent as a bearer token if there is one.

    With `logprobs` the score is a mean over the judge's first token, as in the protocol; without,
    the number is read off its text.

    Raises:
        ValueError: the address is none of http or https.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    logprobs: bool = True
    retries: int = 5
    timeout: float = 60.0
    first_wait: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"The address of the judge is {self.url!r}: give one that begins with http:// or "
                "https://."
            )

    def __call__(self, prompt: str) -> dict[str, Any]:
        """`score` (None without one), `why` there is none, and the `usage` that was reported.

        Raises:
            JudgeFailure: no usable reply after all retries.
            JudgeRefused: a status that will not change.
        """
        read = score_of_logprobs if self.logprobs else score_of_text
        return self._with_retries(prompt, read)

    def as_it_can(self) -> Judge:
        """This judge, without logprobs where it has none, or none of whole numbers: some models
        write a number digit by digit, and their first token says little."""
        try:
            first = self._with_retries(_PROBE, _most_likely)["token"]
        except JudgeRefused:
            first = None  # some endpoints refuse the option itself; a second refusal is a real one
        if first == _PROBED:
            return self
        without = replace(self, logprobs=False)
        without._with_retries(_PROBE, score_of_text)
        return without

    def _with_retries(
        self, prompt: str, read: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        failure = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.first_wait * 2 ** (attempt - 1))
            try:
                reply = self._ask(prompt)
                return {**read(reply["choices"][0]), "usage": reply.get("usage") or {}}
            except urllib.error.HTTPError as error:
                failure = self._failure(error)
                if error.code < 500 and error.code not in _PASSING:
                    raise JudgeRefused(
                        f"The judge at {self.url} refuses every call ({failure}): check address, "
                        "model and key; redirects are not followed."
                    ) from None
            except (OSError, http.client.HTTPException, *_UNREADABLE) as error:
                failure = f"{type(error).__name__}: {error}"
        raise JudgeFailure(failure)

    def _failure(self, error: urllib.error.HTTPError) -> str:
        """Status and first words of a refusal, without the key, which some endpoints repeat."""
        said = error.read().decode("utf-8", "replace")
        if self.key:
            said = said.replace(self.key, "KEY")
        return f"status {error.code}: {said[:200]}"

    def _ask(self, prompt: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 1 if self.logprobs else 8,  # the words for "no score" have several
        }
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        with _OPENER.open(request, timeout=self.timeout) as response:
            return json.loads(response.read())


def score_of_logprobs(choice: dict[str, Any]) -> dict[str, Any]:
    """Mean of the numbers from 0 to 100 among the 20 most likely first tokens, weighted by their
    probability; no score where these have less than a quarter of it."""
    top = _first_token(choice)
    numbers = {
        int(token): math.exp(logprob)
        for token, logprob in top.items()
        if token.isascii() and token.isdigit() and int(token) <= 100
    }
    mass = sum(numbers.values())
    if mass < LEAST_MASS:
        return {"score": None, "why": _label(max(top, key=lambda token: top[token]))}
    return {"score": sum(n * p for n, p in numbers.items()) / mass, "why": None}


def score_of_text(choice: dict[str, Any]) -> dict[str, Any]:
    """The only number from 0 to 100 in the text; a text with several says nothing."""
    text = choice["message"]["content"] or ""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    if len(numbers) == 1 and numbers[0] <= 100:
        return {"score": numbers[0], "why": None}
    return {"score": None, "why": _label(text)}


def _most_likely(choice: dict[str, Any]) -> dict[str, Any]:
    if not choice.get("logprobs"):
        return {"token": None}
    top = _first_token(choice)
    return {"token": max(top, key=lambda token: top[token])}


def _first_token(choice: dict[str, Any]) -> dict[str, float]:
    """Token -> log probability, of the alternatives to the first token."""
    top = choice["logprobs"]["content"][0]["top_logprobs"]
    return {one["token"]: float(one["logprob"]) for one in top}


def _label(text: str) -> str:
    word = text.strip().upper()
    # the first token of a label may be a part of it
    found = (label for label in _LABELS if word and (label in word or label.startswith(word)))
    return next(found, "no number")
