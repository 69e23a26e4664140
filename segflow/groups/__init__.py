"""Groups of training data: partitions, by labels, by k-means on whitened features, split and nested; the features."""

from .groups import Groups

__all__ = ["Groups"]
