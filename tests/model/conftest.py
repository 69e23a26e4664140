"""Fixtures of the tests of the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """In test files that set DTYPE, modules and tensors are made in it, and the same ones in every run."""
    dtype = getattr(request.module, "DTYPE", None)
    if dtype is None:
        yield
        return
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)
