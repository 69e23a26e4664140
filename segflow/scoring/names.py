"""What a unit of scores is called, and what binds it."""

from __future__ import annotations

import torch

from .outer_products import example, products, squared_norms
from .query_operators import Stacks

_SKETCHING = 1 << 28  # bytes
ROUNDED = ("training losses", "outputs")  # differs slightly on another machine: compared, but not in a unit's name


def sketch(values: Stacks) -> list[str]:
    """Two numbers that hardly any change of the queries leaves alone, rounded so that another number of ranks does."""
    if not len(next(iter(values.values()))):
        return []
    generator = torch.Generator().manual_seed(0)
    norm = torch.stack([squared_norms(value).double().sum() for value in values.values()]).sum().sqrt().item()
    projected = 0.0
    for value_QPOI in values.values():
        weights_1POI = torch.randn(1, *value_QPOI.shape[1:], generator=generator).to(example(value_QPOI))
        rows = torch.linspace(1, 2, len(value_QPOI)).to(weights_1POI)
        projected += (rows @ products(value_QPOI, weights_1POI, _SKETCHING)).sum().item()
    return [f"{norm:.3e}", f"{projected / max(norm, 1e-300):.2f}"]
