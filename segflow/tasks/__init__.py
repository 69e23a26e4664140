"""What the user says: the loss that trained the model, and the measurement to explain.

`Task` is what a task of your own derives from; the others are ready made.
"""

from .ready_made import Classification, Regression
from .task import Task

__all__ = ["Classification", "Regression", "Task"]
