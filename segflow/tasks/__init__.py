"""What the user says: the loss that trained the model, and the measurement to explain.

`Task` is what a task of your own derives from; the others are ready made. docs/TASKS.md says which to take.
"""

from .binary import Binary, MultiLabel
from .causal_lm import CausalLM
from .classification import Classification, SequenceClassification
from .completions import Completions, each_token
from .contrastive import ContrastivePairs
from .counting import mean_tokens
from .padding import Padding, pad
from .regression import Regression
from .task import Task
from .tokens import MaskedLM, TokenClassification

__all__ = [
    "Binary",
    "CausalLM",
    "Classification",
    "Completions",
    "ContrastivePairs",
    "MaskedLM",
    "MultiLabel",
    "Padding",
    "Regression",
    "SequenceClassification",
    "Task",
    "TokenClassification",
    "each_token",
    "mean_tokens",
    "pad",
]
