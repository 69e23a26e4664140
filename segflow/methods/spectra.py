"""What an operator does to one eigenvalue: pure scalar functions, applied elementwise.

Bae et al. 2024, arXiv 2405.12186, Eqs. 13 to 22, in sums over a segment's steps: `rate` is the sum of what multiplies
the data's gradient, `shift` the sum of what multiplies the parameter itself (weight decay), and `sigma` an eigenvalue
of the data's curvature. With weight decay w in every step, rate * sigma + shift is the paper's rate * (sigma + w).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_NODES, _SMALL = 24, 0.1  # of the rule; below which eigenvalue it is used, where differences would cancel


def decay(sigma: Tensor, rate: float, shift: Tensor | float = 0.0) -> Tensor:
    """What a segment forgets: exp(-s) with s = rate * sigma + shift.

    Example:
        >>> decay(torch.tensor([0.0, 1.0]), 1.0)
        tensor([1.0000, 0.3679])
    """
    return torch.exp(-(rate * sigma + shift))


def response(sigma: Tensor, rate: float, shift: Tensor | float = 0.0) -> Tensor:
    """What a segment learns: rate * (1 - exp(-s)) / s with s = rate * sigma + shift, and rate at s = 0.

    Example:
        >>> response(torch.tensor([0.0, 1.0]), 1.0)
        tensor([1.0000, 0.6321])
        >>> response(torch.tensor([0.0, 1.0]), 0.0, shift=0.5)
        tensor([0., 0.])
    """
    s = rate * sigma + shift
    safe = torch.where(s == 0, torch.ones_like(s), s)
    return torch.where(s == 0, torch.full_like(s, rate), rate * (-torch.expm1(-safe) / safe))


def decay_quotient(sigma: Tensor, shift: float = 0.0) -> Tensor:
    """(decay(sigma) - decay(0)) / sigma at rate 1, and its limit at sigma = 0, without cancellation.

    What a function of G G^T adds to the function of 0, in the span of G's columns, is made of such quotients.

    Example:
        >>> decay_quotient(torch.tensor([0.0, 1.0]))
        tensor([-1.0000, -0.6321])
    """
    return -math.exp(-shift) * response(sigma, 1.0)


def response_quotient(sigma: Tensor, shift: float = 0.0) -> Tensor:
    """(response(sigma) - response(0)) / sigma at rate 1, and its limit at sigma = 0, without cancellation.

    It is minus the integral over t in [0, 1] of t exp(-t shift) (1 - exp(-t sigma)) / (t sigma): for small sigma by
    Gauss and Legendre's rule.

    Example:
        >>> response_quotient(torch.tensor([0.0, 1.0]))
        tensor([-0.5000, -0.3679])
    """
    nodes, weights = (torch.as_tensor(part).to(sigma) for part in np.polynomial.legendre.leggauss(_NODES))
    t = (nodes + 1) / 2
    small = sigma.clamp_max(_SMALL)[..., None]
    integral = (weights / 2 * t * torch.exp(-t * shift) * response(t * small, 1.0)).sum(-1)
    at_zero = response(torch.zeros_like(sigma), 1.0, shift)
    safe = sigma.clamp_min(_SMALL)
    return torch.where(sigma < _SMALL, -integral, (response(safe, 1.0, shift) - at_zero) / safe)


def saturation(sigma: Tensor, rate: float, shift: Tensor | float = 0.0) -> Tensor:
    """How far a segment has come to its optimum: 1 - exp(-s) with s = rate * sigma + shift, and 0 at rate = 0.

    The paper's form for Adam (Appendix C). A segment that saw none of the data comes no nearer to its optimum, however
    much weight decay shrinks it.

    Example:
        >>> saturation(torch.tensor([0.0, 1.0]), 1.0)
        tensor([0.0000, 0.6321])
    """
    s = rate * sigma + shift
    return -torch.expm1(-s) if rate else torch.zeros_like(s)


def damped_inverse(sigma: Tensor, damping: float | Tensor, rounding: float | None = None) -> Tensor:
    """The influence function's operator: 1 / (sigma + damping), and 0 where that is 0 to rounding (pseudo-inverse).

    rounding: what counts as that, relative to the largest; by default of the tensor's own precision.

    Example:
        >>> damped_inverse(torch.tensor([0.0, 3.0]), 1.0)
        tensor([1.0000, 0.2500])
    """
    damped = sigma + damping
    singular = damped <= (torch.finfo(damped.dtype).eps if rounding is None else rounding) * damped.max()
    return torch.where(singular, 0.0, 1 / torch.where(singular, 1.0, damped))
