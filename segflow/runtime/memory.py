"""Bytes: in words, and the peak memory of this process and of its device, sampled while somebody watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

_SAMPLE_EVERY = 0.1  # seconds between two looks at the memory


def bytes_in_words(number: float) -> str:
    """Bytes as people read them, in decimal units.

    Example:
        >>> bytes_in_words(12), bytes_in_words(999_999), bytes_in_words(3_200_000_000)
        ('12 B', '1 MB', '3.2 GB')
    """
    units = ("B", "kB", "MB", "GB", "TB")
    power = sum(number >= 999.5 * 1000**place for place in range(len(units) - 1))
    return f"{number / 1000**power:.3g} {units[power]}"


class PeakMemory:
    """Peak memory of this process and of its CUDA device, sampled by one thread while somebody watches.

    The thread ends by itself once nobody has watched for half a second.
    """

    def __init__(self) -> None:
        self._peaks: dict[int, list[int]] = {}  # of each block that watches: one number, which the thread raises
        self._process = psutil.Process()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watched(self) -> Iterator[Callable[[], int]]:
        """Watch while the block runs; the function that is yielded tells the peak so far, in bytes."""
        peak = [self._now()]
        self._peaks[id(peak)] = peak
        if self._thread is None:
            self._thread = threading.Thread(target=self._sample, name="segflow-memory", daemon=True)
            self._thread.start()
        try:
            yield lambda: peak[0]
        finally:
            peak[0] = max(peak[0], self._now())
            del self._peaks[id(peak)]

    def _now(self) -> int:
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        return int(self._process.memory_info().rss) + device

    def _sample(self) -> None:
        idle = 0  # looks in a row for nobody
        while idle < 5:
            idle = 0 if self._peaks else idle + 1
            now = self._now()
            for peak in list(self._peaks.values()):
                peak[0] = max(peak[0], now)
            time.sleep(_SAMPLE_EVERY)
        self._thread = None
