"""Does retraining agree? Ground truths, and how far scores agree with them."""

from .bank import Bank, FunctionTraining, Training, read_bank
from .batched import BatchedTraining, Stage
from .empirical import empirical_influence
from .lds import (
    LinearDatamodelingDifference,
    LinearDatamodelingScore,
    linear_datamodeling_difference,
    linear_datamodeling_score,
)
from .mislabelled import detection_auc, found_among_lowest
from .reliability import NoiseCeiling, noise_ceiling
from .retraining import random_subsets, retrain

__all__ = [
    "Bank",
    "BatchedTraining",
    "FunctionTraining",
    "LinearDatamodelingDifference",
    "LinearDatamodelingScore",
    "NoiseCeiling",
    "Stage",
    "Training",
    "detection_auc",
    "empirical_influence",
    "found_among_lowest",
    "linear_datamodeling_difference",
    "linear_datamodeling_score",
    "noise_ceiling",
    "random_subsets",
    "read_bank",
    "retrain",
]
