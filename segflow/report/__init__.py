"""What people look at."""

from .figures import influence_figure, segmentation_figure

__all__ = ["influence_figure", "segmentation_figure"]
