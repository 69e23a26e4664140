"""segflow: which groups of training data made a model behave as it does.

SOURCE (influence followed back through training, Bae et al. 2024) on EK-FAC curvature, for whole groups of data
(GGDA, Ley et al. 2024), with the optimizer that trained the model.
"""

from . import evaluation, methods, properties, tasks
from .analyzer import Analyzer
from .errors import (
    FactorError,
    GroupError,
    LayerError,
    MethodError,
    RankError,
    ScoreError,
    SegflowError,
    StoreError,
    TaskError,
    TrajectoryError,
)
from .groups import Groups
from .methods import (
    TRAK,
    GradientCosine,
    GradientDot,
    Hydra,
    InfluenceFunction,
    LiSSA,
    Method,
    ProjectedFisher,
    RepresentationSimilarity,
    Source,
    TracIn,
)
from .model.layers import BlockSizes
from .results import GroupTree, Refinement, Scores
from .tasks import Task
from .training import CountedSampler, Moves, OptimizerConstants, Trajectory, record
from .version import __version__

__all__ = [
    "TRAK",
    "Analyzer",
    "BlockSizes",
    "CountedSampler",
    "FactorError",
    "GradientCosine",
    "GradientDot",
    "GroupError",
    "GroupTree",
    "Groups",
    "Hydra",
    "InfluenceFunction",
    "LayerError",
    "LiSSA",
    "Method",
    "MethodError",
    "Moves",
    "OptimizerConstants",
    "ProjectedFisher",
    "RankError",
    "Refinement",
    "RepresentationSimilarity",
    "ScoreError",
    "Scores",
    "SegflowError",
    "Source",
    "StoreError",
    "Task",
    "TaskError",
    "TracIn",
    "Trajectory",
    "TrajectoryError",
    "__version__",
    "evaluation",
    "methods",
    "properties",
    "record",
    "tasks",
]
