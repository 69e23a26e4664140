"""Which process: told apart from every other that ran, or runs, on any machine."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil

_CLOCK = 1.5  # seconds: a birth is told by the boot time, which is known in whole seconds and may shift by one


@dataclass(frozen=True)
class ProcessIdentity:
    """A process by its number, its machine and the time (seconds since 1970) at which it was born."""

    pid: int
    host: str
    born: float

    @classmethod
    def own(cls) -> ProcessIdentity:
        """This process."""
        process = psutil.Process()
        return cls(process.pid, socket.gethostname(), process.create_time())

    def is_here(self) -> bool:
        """True if the process belongs to this machine; whether one elsewhere still runs cannot be seen."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """True if the process runs on this machine."""
        return self.is_here() and self._runs() is True

    def is_surely_dead(self) -> bool:
        """True if the process ran on this machine and does not any more."""
        return self.is_here() and self._runs() is False

    def _runs(self) -> bool | None:
        """Whether a process of this number and birth runs here; None where the system does not tell."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.born) < _CLOCK
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError):
            return False
        except psutil.Error:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"
