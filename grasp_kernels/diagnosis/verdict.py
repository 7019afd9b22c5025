"""Numbers of a diagnosis -> found, weak or nothing, and why.

The question is whether what an adapter does to prompts that have nothing to do with its training
data comes from one thing that it learned. Three tests, in this order: neutral prompts answer
differently at all; the stream moves the same way on them; and taking that one movement out takes
most of the effect away, while random directions take nothing away. A task that leaks into other
topics in many small ways passes the first two and fails the third.
"""

from __future__ import annotations

from typing import Any

# Mean KL divergence in nats below which nobody would notice the difference: a convention, not
# calibrated, since every adapter of the dishes is far above it.
NOTICEABLE = 0.01
MAX_P_VALUE = 0.01  # of the sign flips, a tenth of what is possible with 999 of them

# Part of the effect on neutral prompts that goes with the movement direction.
FOUND_REMOVAL = 0.55
WEAK_REMOVAL = 0.45


def score(numbers: dict[str, Any]) -> float:
    """What the verdict turns on, from 0 (nothing) to 1: the part of the effect that one direction
    carries, 0 where neutral prompts do not move together or not noticeably."""
    movement = _movement(numbers)
    if movement is None or not _moves(numbers):
        return 0.0
    removal = movement["removal"]
    return max(0.0, removal["value"]) if removal["value"] > removal["random_max"] else 0.0


def judge(numbers: dict[str, Any]) -> tuple[str, list[str]]:
    """Verdict and reasons, one sentence each."""
    value = score(numbers)
    reasons = [*_effect(numbers), *_carried(numbers), _weights(numbers), _tokens(numbers)]
    reasons = [reason for reason in reasons if reason]
    if value >= FOUND_REMOVAL:
        return "found", reasons
    return ("weak" if value >= WEAK_REMOVAL else "nothing"), reasons


def _movement(numbers: dict[str, Any]) -> dict[str, Any] | None:
    return next((one for one in numbers["directions"] if one["name"] == "movement"), None)


def _moves(numbers: dict[str, Any]) -> bool:
    flip = numbers["consistency"]["sign_flip"]
    return (
        numbers["effect"]["neutral_divergence"] >= NOTICEABLE
        and flip["p_value"] <= MAX_P_VALUE
        and flip["length"] > 0
    )


def _effect(numbers: dict[str, Any]) -> list[str]:
    effect, consistency = numbers["effect"], numbers["consistency"]
    beside = ""
    if "training_divergence" in effect:
        beside = f" ({effect['training_divergence']:.3g} nats on the training answers)"
    reasons = [
        f"On {numbers['neutral_prompts']} neutral prompts the adapter changes the next token by "
        f"{effect['neutral_divergence']:.3g} nats{beside}, and the first choice of "
        f"{effect['neutral_changed']:.0%} of them; {NOTICEABLE} nats count as noticeable."
    ]
    flip = consistency["sign_flip"]
    if flip["length"] == 0:
        return ["The adapter does not move the stream on neutral prompts at all."]
    reasons.append(
        f"They move together by {flip['length']:.2f} of their whole movement, where random signs "
        f"give up to {flip['null_95']:.2f} (p = {flip['p_value']:.3f}, {MAX_P_VALUE} asked for); "
        f"two halves of them agree to a cosine of {consistency['halves']:.2f}."
    )
    return reasons


def _carried(numbers: dict[str, Any]) -> list[str]:
    movement = _movement(numbers)
    if movement is None:
        return []
    removal = movement["removal"]
    return [
        f"Without its movement along that one direction the adapter loses {removal['value']:.0%} "
        f"of its effect on neutral prompts, without that along one of "
        f"{numbers['options']['n_random']} random directions at most {removal['random_max']:.0%}; "
        f"{FOUND_REMOVAL:.0%} and more count as found, below {WEAK_REMOVAL:.0%} as nothing "
        "(calibrated on small models only)."
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
    if score(numbers) < WEAK_REMOVAL:
        return ""
    return (
        "That one direction carries the effect does not make it harmful, an answer format would do "
        "the same: read below which tokens it raises, and on which training records it is largest."
    )
