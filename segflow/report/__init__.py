"""What people look at: figures of scores and of segments, and tables that can be read, drawn, saved and compared."""

from .figures import influence_figure, segmentation_figure
from .row import Row
from .table import Table

__all__ = ["Row", "Table", "influence_figure", "segmentation_figure"]
