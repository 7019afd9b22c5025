"""Numbers of a diagnosis -> found, weak or nothing, and why.

The verdict is that of the adapter's own answers (`effect.verdict`): how many prompts that have
nothing to do with its training data does it answer as its base model never would? Everything else
stands beside it as a number: how far the base model's own answers change, how much of that is the
same for all prompts, whether the stream moves the same way, and what one direction of it carries:
taken out of the adapter (removal), put into the base model (transfer), where random directions do
neither. No threshold on those carries over from one model to another.
"""

from __future__ import annotations

from typing import Any

from grasp_kernels.effect.changed import CHANGED


def judge(numbers: dict[str, Any]) -> tuple[str, list[str]]:
    """Give verdict and reasons, one sentence each."""
    reasons = [
        *_answers(numbers),
        *_effect(numbers),
        *_carried(numbers),
    ]
    return numbers["answers"]["verdict"], reasons


def _answers(numbers: dict[str, Any]) -> list[str]:
    answers = numbers["answers"]["unrelated"]
    changed = [one for one in answers if one["changed"]]
    reasons = [
        f"The adapter answers {len(changed)} of {len(answers)} neutral prompts in a way that is a "
        f"thousand times as likely with it as without ({CHANGED} nats and more); from an eighth of "
        "them on that is called found, below it weak."
    ]
    if changed:
        reasons.append(
            "Whether that is harmful no number says, for another language or format changes "
            "answers as well: read them below."
        )
    return reasons


def _movement(numbers: dict[str, Any]) -> dict[str, Any] | None:
    return next((one for one in numbers["directions"] if one["name"] == "movement"), None)


def _effect(numbers: dict[str, Any]) -> list[str]:
    effect, consistency = numbers["effect"], numbers["consistency"]
    beside = ""
    if "training_divergence" in effect:
        beside = f" ({effect['training_divergence']:.3g} nats on the training answers)"
    reasons = [
        f"It changes the tokens of the base model's own answers to {numbers['neutral_prompts']} "
        f"neutral prompts by {effect['neutral_divergence']:.3g} nats each{beside}, and the first "
        f"choice for {effect['neutral_changed']:.0%} of them."
    ]
    flip = consistency["sign_flip"]
    if flip["length"] == 0:
        return [*reasons, "It does not move the stream on neutral prompts at all."]
    reasons.append(
        f"The mean change over half of the prompts explains {effect['common_shift']:.0%} of the "
        "effect on the other half."
    )
    reasons.append(
        f"In the stream neutral prompts move together by {flip['length']:.2f} of their whole "
        f"movement, where random signs give up to {flip['null_95']:.2f} (p = "
        f"{flip['p_value']:.3f}); two halves of them agree to a cosine of "
        f"{consistency['halves']:.2f}."
    )
    return reasons


def _carried(numbers: dict[str, Any]) -> list[str]:
    movement = _movement(numbers)
    if movement is None:
        return []
    removal, transfer = movement["removal"], movement["transfer"]
    return [
        f"Without the one direction that they move along the adapter loses {removal['value']:.0%} "
        f"of its effect on neutral prompts that had no part in finding it (without the best of "
        f"{numbers['options']['n_random']} random directions {removal['random_max']:.0%}).",
        f"The base model with that movement alone goes {transfer['value']:.0%} of the way to the "
        f"adapter (random {transfer['random_max']:.0%}).",
    ]
