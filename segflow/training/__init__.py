"""What training left behind: `record` writes it beside a live loop, `Trajectory` reads it.

Beside them stand the optimizers' formulas, numbers of every step, the files of a recording, when checkpoints are saved,
and how training is cut into segments. A `CountedSampler` counts the share that each training example had.
"""

from .motion import Moves
from .optimizers import OptimizerConstants
from .record import record
from .sampling import CountedSampler
from .trajectory import Trajectory

__all__ = ["CountedSampler", "Moves", "OptimizerConstants", "Trajectory", "record"]
