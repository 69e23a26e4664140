"""Ground truths: models retrained on subsets, in a pool of processes or many at a time, kept in banks."""

from .bank import Bank, read_bank
from .batched import BatchedTraining
from .pool import random_subsets, retrain
from .stage import Stage
from .training import FunctionTraining, Training

__all__ = [
    "Bank",
    "BatchedTraining",
    "FunctionTraining",
    "Stage",
    "Training",
    "random_subsets",
    "read_bank",
    "retrain",
]
