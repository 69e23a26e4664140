"""Whether `sample=True` is honoured: pseudo-labels are drawn, and the gradients follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.fingerprints import digest
from ..errors import TaskError
from ..model.loss_view import LossView
from ..tasks.task import attention_mask, task_name
from .directions import Probed, probed, random_probes
from .losses import require_no_mean
from .padding import require_mask_used, require_same_inputs
from .probe_examples import ProbeExamples

_DRAWS = 2
_LABELS = {torch.ops.aten.multinomial.default, torch.ops.aten.bernoulli.default}  # whose results are labels themselves


def check_sampling(view: LossView, examples: ProbeExamples, where: str, covariances: bool) -> None:
    """Raise TaskError unless the sampled loss is a sum over the batch and differs from draw to draw.

    Where labels cannot vary, because the model is sure of them, it need not differ as long as some are drawn; a task
    whose `draws_labels` is False need not draw any. view: of kind "sample"; covariances: whether those of inputs are
    wanted, for which padding must be masked. Runs 2 batches, and each example alone.
    """
    along, where = random_probes(view), f"probe of the {view.kind} loss, {where}"
    watched = _WatchedTask(view.task)
    draws: list[Probed] = []
    for draw in range(_DRAWS):
        watched.begin()
        view_of_draw = replace(view, task=watched, seed=view.seed + draw)
        draws.append(probed(view_of_draw, examples.together(), along, where))
    if covariances:
        require_mask_used(view, examples.together(), draws[0], where)
    if len(examples.alone) > 1:
        watched.begin()
        first = replace(view, task=watched)
        alone = [probed(first, single, along, where) for single in examples.alone]
        _require_no_mean(view, draws[0], alone)
        if covariances:
            require_same_inputs(view, examples.together(), draws, alone)
    if _differ(draws[0].features, draws[1].features, view.tolerance) or not getattr(view.task, "draws_labels", True):
        return
    name = task_name(view.task)
    if not watched.calls:
        raise TaskError(
            f"{name}: compute_train_loss(sample=True) gives the same gradients in every draw and calls none of torch's "
            "random functions, so `sample` is ignored or its labels are fixed. Draw labels from the model's own "
            "outputs, see segflow.Task; or set draws_labels = False in the task, if that is meant (an empirical "
            "Fisher)."
        )
    if watched.labels_vary:
        raise TaskError(
            f"{name}: compute_train_loss(sample=True) draws labels that differ from draw to draw, but its gradients do "
            "not: the labels are not used. Compute the loss of the labels that were drawn."
        )


class _WatchedTask:
    """A task whose training loss is watched for random functions that it calls."""

    def __init__(self, task: Any):
        self.task, self.shown_as = task, task_name(task)
        self.calls = 0
        self._labels: list[list[str]] = []

    def begin(self) -> None:
        """Another draw begins."""
        self._labels.append([])

    @property
    def labels_vary(self) -> bool:
        """Whether labels that were drawn differ from draw to draw; only of random functions that return labels."""
        first, *others = self._labels[:_DRAWS]
        return any(other != first for other in others)

    def see(self, function: Any, result: Any) -> None:
        """Note a call of a random function."""
        self.calls += 1
        if function in _LABELS:
            self._labels[-1].append(digest(result))

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The task's own."""
        with _Watch(self):
            loss: Tensor = self.task.compute_train_loss(batch, model, sample=sample)
            return loss

    def get_attention_mask(self, batch: Any) -> Any:
        """The task's own."""
        return attention_mask(self.task, batch)


class _Watch(TorchDispatchMode):
    """Inside, calls of torch's random functions are noted."""

    def __init__(self, task: _WatchedTask):
        super().__init__()
        self._task = task

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._task.see(func, result)
        return result


def _require_no_mean(view: LossView, whole: Probed, alone: list[Probed]) -> None:
    """Raise TaskError if the gradients in a batch are those alone over the batch's size, from the same draws."""
    count = len(alone)
    shrunk = {name: rows * count for name, rows in whole.features.items()}
    joined = {n: torch.cat([single.features[n] for single in alone if n in single.features]) for n in whole.features}
    if all(len(rows) == count for rows in joined.values()):
        parts = torch.stack([single.loss for single in alone]).sum()
        if not _differ(shrunk, joined, view.tolerance):
            require_no_mean(view, whole.loss, parts, count)


def _differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> bool:
    """Whether some example's gradient differs in some layer, beyond rounding."""
    for name in {*one, *other}:
        if name not in one or name not in other:
            return True
        a_Bk, b_Bk = one[name], other[name]
        size_B = torch.maximum(torch.linalg.vector_norm(a_Bk, dim=1), torch.linalg.vector_norm(b_Bk, dim=1))
        if (torch.linalg.vector_norm(a_Bk - b_Bk, dim=1) > tolerance * size_B).any():
            return True
    return False
