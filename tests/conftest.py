"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .support.gang import Gang


@pytest.fixture(scope="session")
def gang() -> Iterator[Gang]:
    found = Gang()
    yield found
    found.close()
