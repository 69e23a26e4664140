"""Fixtures that all test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .support.gang import Gang


@pytest.fixture(autouse=True)
def nothing_is_flushed_to_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the store's own tests, waiting for the disk proves nothing."""
    if "store" not in request.path.parts:
        monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture(scope="session")
def gang() -> Iterator[Gang]:
    found = Gang()
    yield found
    found.close()
