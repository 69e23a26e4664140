"""What training left behind: `record` writes it beside a live loop, `Trajectory` reads it.

Beside them stand the optimizers' formulas, the log of every step, checkpoint files, and segments of training.
"""

from .optimizers import OptimizerConstants
from .record import record
from .trajectory import Trajectory

__all__ = ["OptimizerConstants", "Trajectory", "record"]
