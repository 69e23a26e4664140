"""Methods, each a plan of terms: pure data that the engine gives a meaning.

`Method` says what a method of your own needs; the others are ready made.
"""

from .gradients import GradientCosine, GradientDot, Hydra, RepresentationSimilarity, TracIn
from .influence import InfluenceFunction, LiSSA
from .method import Method
from .projected import TRAK, ProjectedFisher
from .source import Source

__all__ = [
    "TRAK",
    "GradientCosine",
    "GradientDot",
    "Hydra",
    "InfluenceFunction",
    "LiSSA",
    "Method",
    "ProjectedFisher",
    "RepresentationSimilarity",
    "Source",
    "TracIn",
]
