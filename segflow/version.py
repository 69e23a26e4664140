"""The version, known also where segflow runs from a source tree that was not installed."""

__version__ = "0.1.0"
