"""Does retraining agree? Ground truths, how far scores agree with them, and the tasks that scores are used for.

Ground truths: `random_subsets`, `retrain`, and `Bank`, which keeps what a `FunctionTraining` or a `BatchedTraining` of
`Stage`s measured.

Scores against retrainings that are there: `linear_datamodeling_score` and `linear_datamodeling_difference` of their
ranks, `slope_of_change` of their size, `noise_ceiling`, `empirical_influence`. Tasks that retrain what they need, each
a `Table` of `Row`s with a random baseline: `linear_datamodeling_curve`, `retraining_score`, `dataset_pruning`,
`removal_counterfactual`, `leave_one_group_out`.

Wrong labels, without retraining: `noisy_label_detection`, `found_among_lowest`, `detection_auc`.
"""

from ..report import Row, Table
from .counterfactual import removal_counterfactual
from .datamodeling import (
    LinearDatamodelingDifference,
    LinearDatamodelingScore,
    linear_datamodeling_difference,
    linear_datamodeling_score,
)
from .datamodeling_curve import linear_datamodeling_curve
from .detection import Detection, detection_auc, found_among_lowest, noisy_label_detection
from .empirical import empirical_influence
from .leave_out import leave_one_group_out
from .magnitude import slope_of_change
from .noise import NoiseCeiling, noise_ceiling
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
    "linear_datamodeling_curve",
    "linear_datamodeling_difference",
    "linear_datamodeling_score",
    "noise_ceiling",
    "noisy_label_detection",
    "random_subsets",
    "read_bank",
    "removal_counterfactual",
    "removal_order",
    "retrain",
    "retraining_score",
    "slope_of_change",
]
