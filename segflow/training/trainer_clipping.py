"""What clipping left of each step's gradient, from the norms that a Trainer logged. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TrajectoryError
from .per_step import PerStep


@dataclass(frozen=True)
class ClipLog:
    """What is known of the clip factors.

    Args:
        factors: of every step, as `Moves` takes them. words: how much of them was logged; warning: what users must
            know, None where all of it is.
    """

    factors: PerStep
    words: str | None = None
    warning: str | None = None


def clip_factors_of(
    norms: Sequence[tuple[int, float]],
    limit: float,
    steps: int,
    skipped: Callable[[int], tuple[int, int]],
    given: PerStep | None,
) -> ClipLog:
    """The clip factors of all steps; between those that were logged they are interpolated.

    Args:
        norms: the gradients' norm before clipping, by the Trainer's step. limit: max_grad_norm, none where it is 0 or
            less. steps: the optimizer's. skipped: the least and most steps left out up to a step of the Trainer.
        given: the factors as the user gives them.

    Raises:
        TrajectoryError: gradients may have been clipped, and no norm was logged.

    Example:
        >>> log = clip_factors_of([(1, 0.5), (3, 2.0)], 1.0, 3, lambda step: (0, 0), None)
        >>> [round(factor, 3) for factor in log.factors]
        [1.0, 0.75, 0.5]
        >>> log.words
        'logged in 2 of 3 steps, and interpolated between them'
    """
    if given is not None:
        return ClipLog(given, "given by the user")
    if limit <= 0:
        return ClipLog(1.0)
    known, exact = _by_optimizer_step(norms, skipped)
    known = {step: clip_factor(norm, limit) for step, norm in known.items() if 1 <= step <= steps}
    if not known:
        raise TrajectoryError(
            f"trainer_state.json: gradients were clipped to a norm of {limit:g} (max_grad_norm), and no grad_norm was "
            "logged. Give clip_factors=, what clipping left of each step's gradient (1.0 if it never acted)."
        )
    factors = np.interp(np.arange(1, steps + 1), list(known), list(known.values()))
    whole = exact and len(known) == steps
    if whole or min(known.values()) == 1:
        words = None if whole else f"logged in {len(known)} of {steps} steps, none of which was clipped"
        return ClipLog(factors.tolist(), words)
    words = f"logged in {len(known)} of {steps} steps, and interpolated between them"
    advice = "train with logging_steps=1 or RecordCallback to know them all"
    return ClipLog(factors.tolist(), words, f"the clip factors were {words}; {advice}")


def clip_factor(norm: float, limit: float) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients of this norm by.

    Example:
        >>> clip_factor(0.5, 1.0), round(clip_factor(4.0, 1.0), 6)
        (1.0, 0.25)
    """
    return min(1.0, limit / (norm + 1e-6))


def _by_optimizer_step(
    norms: Sequence[tuple[int, float]], skipped: Callable[[int], tuple[int, int]]
) -> tuple[dict[int, float], bool]:
    """The norms by the optimizer's steps, and whether it is certain which step each is of.

    A step that mixed precision left out had a norm that is not finite.
    """
    found: dict[int, Any] = {}
    exact, infinite = True, 0
    for step, norm in norms:
        least, most = skipped(step)
        if not math.isfinite(norm):
            infinite += 1
            if most == least == 0:
                raise TrajectoryError(
                    f"trainer_state.json: the gradients' norm at step {step} is {norm}, and the optimizer took that "
                    "step. End the run before it, or look at why training went wrong."
                )
            continue
        exact = exact and least <= infinite <= most
        found[step - min(max(infinite, least), most)] = norm
    return dict(sorted(found.items())), exact
