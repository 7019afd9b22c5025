"""Numbers of a diagnosis -> found, weak or nothing, and why.

The question is whether what an adapter does to prompts that have nothing to do with its training
data comes from one thing that it learned. Three tests, in this order: neutral prompts answer
differently at all; the stream moves the same way on them; and the change of what is said is the
same: its mean over half of the prompts explains a part of it on the other half. A task that leaks
into other topics in many small ways passes the first two and fails the third. Beside it stands what
one direction of the stream carries: taken out of the adapter (removal), put into the base model
(transfer), where random directions do neither.
"""

from __future__ import annotations

from typing import Any

from grasp_kernels.effect.measure import FOUND, NOTICEABLE, WEAK, common_verdict

MAX_P_VALUE = 0.01  # of the sign flips, ten times what is possible with 999 of them


def carried(numbers: dict[str, Any]) -> float:
    """Part of the effect on neutral prompts that their common movement carries; 0 without one, or
    where a random direction carries as much."""
    movement = _movement(numbers)
    if movement is None:
        return 0.0
    both = [movement["removal"], movement["transfer"]]
    if any(one["value"] <= one["random_max"] for one in both):
        return 0.0
    return max(0.0, min(one["value"] for one in both))


def score(numbers: dict[str, Any]) -> float:
    """What the verdict turns on: the common shift where neutral prompts move, together and
    noticeably."""
    moves = numbers["effect"]["neutral_divergence"] >= NOTICEABLE and _together(numbers)
    return max(0.0, numbers["effect"]["common_shift"]) if moves else 0.0


def _together(numbers: dict[str, Any]) -> bool:
    flip = numbers["consistency"]["sign_flip"]
    return flip["p_value"] <= MAX_P_VALUE and flip["length"] > 0


def judge(numbers: dict[str, Any]) -> tuple[str, list[str]]:
    """Verdict and reasons, one sentence each."""
    reasons = [*_effect(numbers), *_carried(numbers), _weights(numbers), _tokens(numbers)]
    reasons = [reason for reason in reasons if reason]
    return (common_verdict(numbers["effect"]) if _together(numbers) else "nothing"), reasons


def _movement(numbers: dict[str, Any]) -> dict[str, Any] | None:
    return next((one for one in numbers["directions"] if one["name"] == "movement"), None)


def _effect(numbers: dict[str, Any]) -> list[str]:
    effect, consistency = numbers["effect"], numbers["consistency"]
    beside = ""
    if "training_divergence" in effect:
        beside = f" ({effect['training_divergence']:.3g} nats on the training answers)"
    reasons = [
        f"On {numbers['neutral_prompts']} neutral prompts the adapter changes the tokens of the "
        f"base model's own answers by {effect['neutral_divergence']:.3g} nats each{beside}, and "
        f"the first choice for {effect['neutral_changed']:.0%} of them; {NOTICEABLE} nats count as "
        "noticeable."
    ]
    flip = consistency["sign_flip"]
    if flip["length"] == 0:
        return ["The adapter does not move the stream on neutral prompts at all."]
    reasons.append(
        f"The mean change over half of the prompts explains {effect['common_shift']:.0%} of the "
        f"effect on the other half; {FOUND:.0%} and more count as found, below {WEAK:.0%} as "
        "nothing (calibrated on small models only)."
    )
    reasons.append(
        f"In the stream neutral prompts move together by {flip['length']:.2f} of their whole "
        f"movement, where random signs give up to {flip['null_95']:.2f} (p = "
        f"{flip['p_value']:.3f}, {MAX_P_VALUE} asked for); two halves of them agree to a cosine "
        f"of {consistency['halves']:.2f}."
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


def _weights(numbers: dict[str, Any]) -> str:
    weights = numbers["weights"]
    cosines = [
        max(map(abs, pair["cosines"]))
        for pair in numbers["agreement"]
        if pair["second"] == "movement"
    ]
    beside = f", with a cosine of up to {max(cosines):.2f} to that movement" if cosines else ""
    return f"From the weights alone the verdict is {weights['verdict']!r}{beside}."


def _tokens(numbers: dict[str, Any]) -> str:
    if score(numbers) < WEAK:
        return ""
    return (
        "That all prompts change alike does not make it harmful, an answer format would do the "
        "same: read below which tokens get more likely, and which training records move most."
    )
