"""Does retraining agree? Ground truths, how far scores agree with them, and the tasks that scores are used for."""

from ..report import Row, Table
from .counterfactual import removal_counterfactual
from .datamodeling import (
    LinearDatamodelingDifference,
    LinearDatamodelingScore,
    linear_datamodeling_difference,
    linear_datamodeling_score,
    linear_datamodeling_scores,
)
from .detection import Detection, detection_auc, found_among_lowest, noisy_label_detection
from .empirical import empirical_influence
from .leave_out import leave_one_group_out
from .removal import dataset_pruning, removal_order, retraining_score
from .retraining import (
    Bank,
    BatchedTraining,
    FunctionTraining,
    Stage,
    Training,
    random_subsets,
    read_bank,
    retrain,
)
from .statistics import NoiseCeiling, noise_ceiling

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
