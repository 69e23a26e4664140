"""What an operator does to one eigenvalue: pure scalar functions, applied elementwise.

Bae et al. 2024, arXiv 2405.12186, Eqs. 13 to 22. `lr_steps` is the sum of a segment's effective learning rates and
`sigma` an eigenvalue of the objective's curvature, weight decay included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decay(sigma: Tensor, lr_steps: float) -> Tensor:
    """What a segment forgets: exp(-lr_steps * sigma).

    Example:
        >>> decay(torch.tensor([0.0, 1.0]), 1.0)
        tensor([1.0000, 0.3679])
    """
    return torch.exp(-lr_steps * sigma)


def response(sigma: Tensor, lr_steps: float) -> Tensor:
    """What a segment learns: (1 - exp(-lr_steps * sigma)) / sigma, and lr_steps at sigma = 0.

    Example:
        >>> response(torch.tensor([0.0, 1.0]), 1.0)
        tensor([1.0000, 0.6321])
    """
    safe = torch.where(sigma == 0, torch.ones_like(sigma), sigma)
    return torch.where(sigma == 0, torch.full_like(sigma, lr_steps), -torch.expm1(-lr_steps * safe) / safe)


def saturation(sigma: Tensor, lr_steps: float) -> Tensor:
    """How far a segment has come to its optimum: 1 - exp(-lr_steps * sigma) (the paper's form for Adam, Appendix C).

    Example:
        >>> saturation(torch.tensor([0.0, 1.0]), 1.0)
        tensor([0.0000, 0.6321])
    """
    return -torch.expm1(-lr_steps * sigma)


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
