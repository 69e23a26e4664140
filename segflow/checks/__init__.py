"""What can be wrong with a task, a model or a trajectory, found on a few batches before hours are spent.

`losses` checks what every loss must fulfil and `sampling` that `sample=True` is honoured, on the distinct examples that
`probe_examples` finds. `guards` runs both before every fit and score; `stage_check` does so on each stage of training
and measures the scale of its pseudo-labels besides (`curvature_scale`), for the report of `Analyzer.check`, which says
what is attributed as well (`coverage`).
"""

from .check_report import CheckReport
from .coverage import Coverages
from .curvature_scale import CurvatureScale
from .guards import Guards
from .stage_check import CurvatureCheck, check_checkpoints, check_run

__all__ = [
    "CheckReport",
    "Coverages",
    "CurvatureCheck",
    "CurvatureScale",
    "Guards",
    "check_checkpoints",
    "check_run",
]
