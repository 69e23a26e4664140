"""Does retraining agree? Ground truths, and how far scores agree with them."""

from .bank import Bank, FunctionTraining, Training, read_bank
from .batched import BatchedTraining, Stage
from .lds import LinearDatamodelingScore, linear_datamodeling_score
from .mislabelled import detection_auc, found_among_lowest
from .retraining import random_subsets, retrain

__all__ = [
    "Bank",
    "BatchedTraining",
    "FunctionTraining",
    "LinearDatamodelingScore",
    "Stage",
    "Training",
    "detection_auc",
    "found_among_lowest",
    "linear_datamodeling_score",
    "random_subsets",
    "read_bank",
    "retrain",
]
