"""What raises agreement with retraining and what does not: SOURCE's parts exchanged one by one.

python -m benchmarks.fidelity.explore ROW...    one line for each variant (one run, mean over the first two runs), and
a result file for each row

Each variant is a plan of its own over the same engine and store, so this file is also an example of writing one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import segflow as sf
from segflow.evaluation import linear_datamodeling_score
from segflow.methods.plan import Operator, Plan, Scale, Spectral, Term

from ..result_files import made, write_result
from .rows import ROWS, Row
from .scoring import RESULTS, parts_of
from .training import folder_of, load_run

RUNS = 2
EXPLORED = RESULTS.parent / "explored"


@dataclass(frozen=True)
class Variant:
    """SOURCE with some of its parts taken from the run as a whole, or from its end.

    gradients: "own" (each segment's), "run" (pooled over the whole run) or "last" (the last checkpoint's); curvature
    likewise; scale: multiplies lr_steps; apart: a term for each checkpoint, with that checkpoint's preconditioner where
    the response leaves.
    """

    segments: int = 1
    gradients: str = "own"
    curvature: str = "own"
    scale: float = 1.0
    weights: str = "nearest"
    apart: bool = False

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        """SOURCE's plan, changed."""
        own = sf.Source(self.segments, checkpoint_weights=self.weights).plan(trajectory, stage)
        [run] = sf.Source(1, checkpoint_weights=self.weights).plan(trajectory, stage)
        changed = [self._changed(term, run) for term in own]
        return tuple(piece for term in changed for piece in (_by_checkpoint(term) if self.apart else [term]))

    def _changed(self, term: Term, run: Term) -> Term:
        [whole] = [op.curvature for op in run.operators if isinstance(op, Spectral) and op.curvature]
        operators: list[Operator] = []
        for op in term.operators:
            if isinstance(op, Spectral) and op.curvature is not None:
                kept = op.curvature
                if self.curvature == "run":
                    kept = whole
                elif self.curvature == "last":
                    kept = replace(kept, points=kept.points[-1:], weights=(1.0,))
                amount = tuple(None if a is None else a * self.scale for a in op.amount)
                shift, coupled = (tuple(part * self.scale for part in parts) for parts in (op.shift, op.coupled))
                operators.append(replace(op, curvature=kept, amount=amount, shift=shift, coupled=coupled))
            elif isinstance(op, Scale) and self.curvature == "run" and whole.scaled is not None:
                operators.append(replace(op, preconditioner=whole.scaled))
            else:
                operators.append(op)
        source = run if self.gradients in ("run", "last") else term
        points, weights = source.train, source.weights
        if self.gradients == "last":
            points, weights = points[-1:], (1.0,)
        return replace(term, operators=tuple(operators), train=points, weights=weights)


def _by_checkpoint(term: Term) -> Iterator[Term]:
    """A term for each checkpoint, whose gradients meet its own preconditioner: P^1/2 f P^-1/2 P_checkpoint."""
    *before, last = term.operators
    for point, weight in zip(term.train, term.weights, strict=True):
        leave: tuple[Operator, ...] = (last,)
        of_groups = weight if isinstance(weight, tuple) else (weight,)
        if isinstance(last, Scale):
            own = replace(last.preconditioner, weights=point.weights)
            leave = (Scale(last.preconditioner, -0.5), Scale(own, 1.0))
        share = Spectral(
            stage=term.stage, kind="constant", curvature=None, amount=of_groups, shift=(0.0,) * len(of_groups)
        )
        label = f"{term.label}, checkpoint {point.weights[0][0]}"
        yield replace(term, label=label, operators=(*before, *leave, share), train=(point,), weights=(1.0,))


VARIANTS = {
    "1 segment (the default)": Variant(),
    "1 segment, checkpoints weigh the same": Variant(weights="equal"),
    "3 segments": Variant(3),
    "3 segments, each with the gradients of the whole run": Variant(3, gradients="run"),
    "3 segments, each with the curvature of the whole run": Variant(3, curvature="run"),
    "1 segment, last checkpoint's gradients": Variant(gradients="last"),
    "1 segment, last checkpoint's curvature": Variant(curvature="last"),
    "lr_steps times 2": Variant(scale=2.0),
    "lr_steps times 4": Variant(scale=4.0),
    "lr_steps times 1/2": Variant(scale=0.5),
    "each checkpoint's own P": Variant(apart=True),
}


def explore(row: Row) -> Path:
    """Every variant that suits the row; writes its result."""
    found = {}
    for name, variant in VARIANTS.items():
        if row.recipes[-1].optimizer == "adamw" or not variant.apart:
            found[name] = agreement(row, variant)
            print(f"{row.name:40s} {name:54s} {found[name]:.3f}", flush=True)
    content = {"row": row.name, "made": made(), "runs": RUNS, "variants": found}
    return write_result(EXPLORED / f"{row.name}.json", content)


def agreement(row: Row, variant: Variant) -> float:
    """The linear datamodeling score of a variant on a row, averaged over single runs."""
    found = []
    for part in parts_of(row, row.measurements[0]):
        for seed in range(RUNS):
            model, trajectory = load_run(row, seed)
            (train,), query = row.datasets()
            regression = row.is_regression
            task = sf.tasks.Regression() if regression else sf.tasks.Classification(part.measurement)
            store = folder_of(row) / "stores" / f"explore-{seed}"
            analyzer = sf.Analyzer(model, task, trajectory, store=store, method=variant, progress=False)
            analyzer.fit(train, batch_size=256)
            scores = analyzer.score(sf.Groups.singletons(len(train)), train, query, batch_size=256)
            found.append(linear_datamodeling_score(scores, part.subsets, part.measured.mean(1)).mean)
    return float(np.mean(found))


def main() -> None:
    """Print every variant on the rows that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity.explore", description=__doc__)
    parser.add_argument("rows", nargs="+", choices=[name for name, row in ROWS.items() if "stage" not in name])
    torch.set_num_threads(1)
    for row in parser.parse_args().rows:
        print(explore(ROWS[row]), flush=True)


if __name__ == "__main__":
    main()
