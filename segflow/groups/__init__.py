"""Groups of training data: partitions, k-means on whitened features, and the features."""

from .groups import Groups

__all__ = ["Groups"]
