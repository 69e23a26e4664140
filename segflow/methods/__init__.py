"""Methods, each a plan of terms: pure data that the engine gives a meaning.

The ready-made ones, what a method of your own needs (`Method`), and what plans are made of. A method of your own is a
frozen dataclass with a `plan`; the engine fits what its terms need and takes their word for the rest.

Example:
    >>> from dataclasses import dataclass
    >>> from segflow.methods import Point, Spectral, Term, final_point, stage_place
    >>> @dataclass(frozen=True)
    ... class FirstCheckpoint:
    ...     "The product of the final query gradient and the training gradients at a stage's first checkpoint."
    ...     factor: float = 1.0
    ...     def plan(self, trajectory, stage=-1):
    ...         place = stage_place(trajectory, stage)
    ...         groups = trajectory.stages[place].learning_rates.shape[1]
    ...         times = Spectral(
    ...             stage=place, kind="constant", curvature=None, amount=(self.factor,) * groups, shift=(0.0,) * groups
    ...         )
    ...         first = Point.at(place, 0)
    ...         term = Term(
    ...             label="first", stage=place, query=final_point(trajectory), operators=(times,), train=(first,),
    ...             weights=(1.0,),
    ...         )
    ...         return (term,)
    >>> FirstCheckpoint(2.0).factor
    2.0
"""

from ..training.segments import Segmentation, segmentation
from .gradients import GradientCosine, GradientDot, Hydra, RepresentationSimilarity, TracIn
from .influence import InfluenceFunction, LiSSA
from .method import AutomaticMethod, Method, final_point, stage_place
from .plan import (
    CoupledFunction,
    Curvature,
    IterativeInverse,
    Operator,
    Plan,
    Point,
    Preconditioner,
    ProjectedInverse,
    Projection,
    SampledFisher,
    Scale,
    Spectral,
    Term,
    TraceShares,
    UnitNorm,
)
from .projected import TRAK, ProjectedFisher
from .source import Source

__all__ = [
    "TRAK",
    "AutomaticMethod",
    "CoupledFunction",
    "Curvature",
    "GradientCosine",
    "GradientDot",
    "Hydra",
    "InfluenceFunction",
    "IterativeInverse",
    "LiSSA",
    "Method",
    "Operator",
    "Plan",
    "Point",
    "Preconditioner",
    "ProjectedFisher",
    "ProjectedInverse",
    "Projection",
    "RepresentationSimilarity",
    "SampledFisher",
    "Scale",
    "Segmentation",
    "Source",
    "Spectral",
    "Term",
    "TracIn",
    "TraceShares",
    "UnitNorm",
    "final_point",
    "segmentation",
    "stage_place",
]
