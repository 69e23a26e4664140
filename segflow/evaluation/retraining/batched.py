"""Many models trained in one process, each alone or many at a time, and measured.

Axis letters: J models, N examples, Q queries, P measurements of each query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...arguments import settle, whole_number
from ...errors import ScoreError
from .alone import trained_alone
from .carry import refusal
from .pool import Job
from .random_state import all_seeded, nothing_drawn
from .recipe_identity import Recipe, batched_identity
from .stacked import StackedModels
from .stage import Stage

Measure = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class BatchedTraining:
    """Trains many models, each on its own subset, from its own initialisation, in its own order of the data.

    Each model is what an ordinary loop in torch makes of it: after `torch.manual_seed(seed)` come `build()` and, for
    each stage, `optimizer(list(model.parameters()))` and every epoch's batches, whose order is drawn by
    `torch.randperm(kept, generator=...)` from one `torch.Generator` of the same seed; then `model.eval()`.

    With `together=1` it is that loop, to the last bit, for whatever a loop can train (dropout, batch normalisation,
    hooks, optimizers of one's own). The global generators of NumPy and Python start at the job's seed too (NumPy's at
    `seed % 2**32`), and all three are put back, so that a job repeats itself.

    With a larger `together` parameters are stacked, and a model comes out as it does alone up to rounding, or is
    refused by name, in the same way for one job as for many. The optimizer is made for a single model, so that groups
    by shape, attributes of parameters, options of groups and frozen parameters are carried over. Refused are: buffers
    (batch normalisation); random draws in the model, the loss, the measure or the recipe (dropout); optimizers that do
    not treat each number by itself, such as Muon, Adafactor or one's own, subclasses of torch's among them; schedules
    of one's own, or that look at parameters; hooks on steps, parameters, tensors or backward passes; groups, options
    or structure that differ from seed to seed; embeddings with `padding_idx`, `max_norm`, `scale_grad_by_freq` or
    `sparse`; lazy modules; recurrent layers; label smoothing together with weights of classes; numbers, texts and
    tensors that follow the seed but are no parameters; control flow that depends on data, and whatever else
    `torch.func.vmap` cannot do.
    Not noticed is what a model or a loss begins to do otherwise than at a stage's first step by a count of its own.

    Args:
        build: makes the freshly initialised model.
        stages: one, or several in the order in which they are trained, each with an optimizer of its own. A subset's
            columns are the examples of the first stage, then those of the second, and so on.
        query_inputs, query_targets: what is measured after training.
        measure: (one model's outputs [Q, ...], targets [Q, ...]) -> [Q], or [P, Q] for several measurements at once.
        together: how many models are trained at a time. Small models gain from hundreds; a model that fills the
            processor's caches does best alone.

    Raises:
        ScoreError: there are no stages, or a number is below 1.

    Example:
        >>> from functools import partial
        >>> inputs, targets = torch.randn(8, 3), torch.randn(8, 1)
        >>> stage = Stage(inputs, targets, nn.functional.mse_loss, partial(torch.optim.SGD, lr=0.1), 2, batch_size=4)
        >>> training = BatchedTraining(
        ...     partial(nn.Linear, 3, 1), (stage,), inputs, targets, lambda out, y: (out - y).square().squeeze(1)
        ... )
        >>> training.run([(np.arange(4), 1), (np.arange(4, 8), 2)]).shape
        (2, 8)
    """

    build: Callable[[], nn.Module]
    stages: Sequence[Stage]
    query_inputs: Tensor
    query_targets: Tensor
    measure: Measure
    together: int = 64

    def __post_init__(self) -> None:
        settle(self, together=whole_number("together", self.together, ScoreError, 1, advice="It counts models."))
        if not self.stages:
            raise ScoreError("stages: there are none. Expected a Stage, or several in the order of training.")

    @property
    def examples(self) -> int:
        """The number of examples of all stages: a subset's columns."""
        return sum(len(stage.inputs) for stage in self.stages)

    def settings(self) -> dict[str, Any]:
        """What the results depend on, as JSON: the fingerprint that a bank is bound to.

        A loss, a measure, an optimizer and a schedule count by what their code reaches, and by numbers that they give.
        """
        queries = (self.query_inputs, self.query_targets)
        return batched_identity(Recipe(self.build, self.stages, queries, self.measure))

    def batches(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Places of the jobs that are trained together: those that keep as many examples of each stage."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, (kept, _) in enumerate(jobs):
            alike.setdefault(tuple(map(len, self._by_stage(kept))), []).append(place)
        size = self.together
        return [places[begin : begin + size] for places in alike.values() for begin in range(0, len(places), size)]

    def run(self, jobs: Sequence[Job]) -> np.ndarray:
        """Train one model for each (indices of the kept examples, seed); the measurements [J, ...] in float64.

        A model that diverges changes no other one; its measurements are not finite.

        Raises:
            ScoreError: a stage is left without examples, a measurement has another shape than [Q] or [P, Q], or
                models cannot be trained together.
        """
        measured: list[np.ndarray | None] = [None] * len(jobs)
        for places in self.batches(jobs):
            chosen = [jobs[place] for place in places]
            of_batch = self._together(chosen) if self.together > 1 else map(self._alone, chosen)
            for place, of_job in zip(places, of_batch, strict=True):
                measured[place] = of_job
        return np.stack(self._without_gaps(measured))

    def _alone(self, job: Job) -> np.ndarray | None:
        kept, seed = job
        with all_seeded(seed):
            model = trained_alone(self.build, self.stages, self._by_stage(kept), seed).eval()
            with torch.no_grad():
                return self._measured(model(self.query_inputs))

    def _together(self, jobs: Sequence[Job]) -> list[np.ndarray | None]:
        models = StackedModels(self.build, [seed for _, seed in jobs])
        kept = [self._by_stage(indices) for indices, _ in jobs]
        for stage, of_each in zip(self.stages, zip(*kept, strict=True), strict=True):
            models.train(stage, of_each)
        with (
            torch.no_grad(),
            nothing_drawn(lambda name: refusal(f"`measure` draws at random (from {name}'s generator)")),
        ):
            return [self._measured(outputs) for outputs in models.outputs(self.query_inputs)]

    def _measured(self, outputs: Any) -> np.ndarray | None:
        """One model's measurements; None if they fail because its outputs are not finite."""
        try:
            measured = self.measure(outputs, self.query_targets)
        except Exception:
            if isinstance(outputs, Tensor) and not outputs.isfinite().all():
                return None
            raise
        shape, queries = list(getattr(measured, "shape", ())), len(self.query_inputs)
        if not isinstance(measured, Tensor) or len(shape) not in (1, 2) or shape[-1] != queries:
            raise ScoreError(
                f"measure gave a {type(measured).__name__} {shape}, expected a tensor [Q] or [P, Q] with Q = {queries}."
            )
        of_one: np.ndarray = measured.double().cpu().numpy()
        return of_one

    def _without_gaps(self, measured: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """NaN for those that could not be measured, in the shape of the others."""
        shapes = {of_job.shape for of_job in measured if of_job is not None} or {self._untrained().shape}
        if len(shapes) > 1:
            raise ScoreError(f"measure gave {' and '.join(map(str, sorted(shapes)))}, expected one shape for all.")
        return [np.full(min(shapes), np.nan) if of_job is None else of_job for of_job in measured]

    def _untrained(self) -> np.ndarray:
        """The measurements of a model as it is initialised."""
        with all_seeded(0), torch.no_grad():
            measured = self._measured(self.build().eval()(self.query_inputs))
        if measured is None:
            raise ScoreError("the outputs of an untrained model are not finite. Look at `build` and the queries.")
        return measured

    def _by_stage(self, kept: np.ndarray) -> list[np.ndarray]:
        """The kept examples of each stage, counted from its own first."""
        bounds = np.cumsum([0, *(len(stage.inputs) for stage in self.stages)])
        if len(kept) and not 0 <= min(kept) <= max(kept) < bounds[-1]:
            raise ScoreError(f"a subset names example {max(kept)}, but the stages have 0..{bounds[-1] - 1}.")
        by_stage = [kept[(kept >= begin) & (kept < end)] - begin for begin, end in pairwise(bounds)]
        for number, of_stage in enumerate(by_stage):
            if not len(of_stage):
                raise ScoreError(f"a subset keeps no example of stage {number}. Keep at least one of each.")
        return by_stage
