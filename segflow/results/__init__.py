"""The answer: labelled scores, scores of nested groups, and coarse groups refined to single examples."""

from .refinement import Refinement
from .scores import Scores
from .slope import Slope
from .tree import GroupTree

__all__ = ["GroupTree", "Refinement", "Scores", "Slope"]
