"""The answer: labelled scores, also of nested and refined groups, and the slope of real changes on them."""

from .refinement import Refinement
from .scores import Scores
from .slope import Slope
from .tree import GroupTree

__all__ = ["GroupTree", "Refinement", "Scores", "Slope"]
