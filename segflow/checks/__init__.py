"""What can be wrong with a task, a model or a trajectory, found on a few batches before hours are spent.

`losses` checks what every loss must fulfil, `curvature_scale` the pseudo-labels of `sample=True`; `stage_check` runs
both on one stage of training, and `check_report` is what `Analyzer.check` returns.
"""

from .check_report import CheckReport
from .curvature_scale import CurvatureScale
from .stage_check import check_checkpoints, check_stage

__all__ = ["CheckReport", "CurvatureScale", "check_checkpoints", "check_stage"]
