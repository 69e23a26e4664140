"""What people look at."""

from .figures import influence_figure

__all__ = ["influence_figure"]
