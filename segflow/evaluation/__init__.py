"""Does retraining agree? Ground truths, how far scores agree with them, and the tasks that scores are used for."""

from .bank import Bank, FunctionTraining, Training, read_bank
from .batched import BatchedTraining, Stage
from .counterfactual import removal_counterfactual
from .datamodeling import linear_datamodeling_scores
from .detection import Detection, noisy_label_detection
from .empirical import empirical_influence
from .lds import (
    LinearDatamodelingDifference,
    LinearDatamodelingScore,
    linear_datamodeling_difference,
    linear_datamodeling_score,
)
from .leave_out import leave_one_group_out
from .mislabelled import detection_auc, found_among_lowest
from .reliability import NoiseCeiling, noise_ceiling
from .removal import dataset_pruning, removal_order, retraining_score
from .retraining import random_subsets, retrain
from .table import Row, Table

__all__ = [
    "Bank",
    "BatchedTraining",
    "Detection",
    "FunctionTraining",
    "LinearDatamodelingDifference",
    "LinearDatamodelingScore",
    "NoiseCeiling",
    "Row",
    "Stage",
    "Table",
    "Training",
    "dataset_pruning",
    "detection_auc",
    "empirical_influence",
    "found_among_lowest",
    "leave_one_group_out",
    "linear_datamodeling_difference",
    "linear_datamodeling_score",
    "linear_datamodeling_scores",
    "noise_ceiling",
    "noisy_label_detection",
    "random_subsets",
    "read_bank",
    "removal_counterfactual",
    "removal_order",
    "retrain",
    "retraining_score",
]
