"""What raises agreement with retraining and what does not: SOURCE's parts exchanged one by one.

python -m benchmarks.fidelity.explore ROW...    one line for each variant (one run, mean over the first two runs), and
a result file for each row

Only rows on which defaults may be chosen can be named. Each variant is a plan of its own over the same engine and
store, so this file is also an example of writing one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import segflow as sf
from segflow.evaluation import linear_datamodeling_score
from segflow.methods.plan import Curvature, Operator, Plan, Scale, Spectral, Term, TraceShares

from ..result_files import made, write_result
from .parts import parts_of
from .rows import ROWS, TUNING, Row
from .scoring import RESULTS
from .training import folder_of, load_run

RUNS = 2
EXPLORED = RESULTS.parent / "explored"


@dataclass(frozen=True)
class Variant:
    """SOURCE with some of its parts taken from the run as a whole, or from its end.

    source: with what it has options for; gradients: "own" (each segment's),
    "run" (pooled over the whole run) or "last" (the last checkpoint's); curvature likewise; apart: a term for each
    checkpoint, with that checkpoint's preconditioner where the response leaves.
    """

    source: sf.Source
    gradients: str = "own"
    curvature: str = "own"
    apart: bool = False

    def suits(self, row: Row) -> bool:
        """Whether it differs on the row from what is made anyway."""
        return row.recipes[-1].optimizer == "adamw" or not self.apart

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        """SOURCE's plan, changed."""
        own = self.source.plan(trajectory, stage)
        [run] = replace(self.source, segments=1).plan(trajectory, stage)
        changed = [self._changed(term, run) for term in own]
        return tuple(piece for term in changed for piece in (_by_checkpoint(term) if self.apart else [term]))

    def _changed(self, term: Term, run: Term) -> Term:
        """The term with the gradients and the curvature that the variant says."""
        source = run if self.gradients in ("run", "last") else term
        points, weights = source.train, source.weights
        if self.gradients == "last":
            points, weights = points[-1:], (1.0,)
        operators = tuple(self._exchanged(op, run) for op in term.operators)
        return replace(term, operators=operators, train=points, weights=weights)

    def _exchanged(self, op: Operator, run: Term) -> Operator:
        """The operator with the curvature that the variant says, and the P that belongs to it."""
        [whole] = {op.curvature for op in run.operators if isinstance(op, Spectral) and op.curvature}
        if isinstance(op, Spectral) and op.curvature is not None:
            last = replace(op.curvature, points=op.curvature.points[-1:], weights=(1.0,))
            return _with_curvature(op, {"own": op.curvature, "run": whole, "last": last}[self.curvature])
        if isinstance(op, Scale) and self.curvature == "run" and whole.scaled is not None:
            return replace(op, preconditioner=whole.scaled)
        return op


@dataclass(frozen=True)
class Other:
    """Another method with what SOURCE has: queries along the run, or layers coupled by the shares of their traces."""

    base: Any
    along: bool = False
    coupled: bool = False

    def suits(self, row: Row) -> bool:
        """On every row."""
        return True

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        """The method's plan, changed."""
        [source] = sf.Source().plan(trajectory, stage)
        ones = (1.0,) * trajectory.learning_rates.shape[1]
        terms: Plan = self.base.plan(trajectory, stage)
        if self.along:
            terms = tuple(replace(t, query=source.query, query_weights=source.query_weights) for t in terms)
        return tuple(
            replace(term, operators=tuple(_shared(op, ones) if self.coupled else op for op in term.operators))
            for term in terms
        )


def _shared(op: Operator, rates: tuple[float, ...]) -> Operator:
    """A function of blocks, whose eigenvalues are divided by their layers' shares."""
    if not isinstance(op, Spectral) or op.curvature is None:
        return op
    return replace(op, trace_shares=TraceShares(stage=op.stage, curvature=op.curvature, rates=rates))


def _with_curvature(op: Spectral, curvature: Curvature) -> Spectral:
    """The operator at another curvature, which its layers' shares are of, too."""
    shares = None if op.trace_shares is None else replace(op.trace_shares, curvature=curvature)
    return replace(op, curvature=curvature, trace_shares=shares)


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


_ONE, _THREE = sf.Source(), sf.Source(segments=3)
VARIANTS: dict[str, Variant | Other] = {
    "1 segment (the default)": Variant(_ONE),
    "1 segment, checkpoints weigh the same": Variant(sf.Source(checkpoint_weights="equal")),
    "3 segments": Variant(_THREE),
    "3 segments, each with the gradients of the whole run": Variant(_THREE, gradients="run"),
    "3 segments, each with the curvature of the whole run": Variant(_THREE, curvature="run"),
    "1 segment, last checkpoint's gradients": Variant(_ONE, gradients="last"),
    "1 segment, last checkpoint's curvature": Variant(_ONE, curvature="last"),
    "lr_steps times 2": Variant(sf.Source(lr_steps_scale=2.0)),
    "lr_steps times 4": Variant(sf.Source(lr_steps_scale=4.0)),
    "each checkpoint's own P": Variant(_ONE, apart=True),
    "influence function (EK-FAC)": Other(sf.InfluenceFunction()),
    "influence function, queries along the run": Other(sf.InfluenceFunction(), along=True),
    "influence function, layers coupled": Other(sf.InfluenceFunction(), coupled=True),
    "projected Fisher": Other(sf.ProjectedFisher(512)),
    "projected Fisher, queries along the run": Other(sf.ProjectedFisher(512), along=True),
    "TRAK, damped": Other(sf.TRAK(512, "heuristic")),
    "TRAK, damped, queries along the run": Other(sf.TRAK(512, "heuristic"), along=True),
}


def explore(row: Row) -> Path:
    """Every variant that suits the row; writes its result."""
    found = {}
    for name, variant in VARIANTS.items():
        if variant.suits(row):
            found[name] = agreement(row, variant)
            print(f"{row.name:40s} {name:54s} {found[name]:.3f}", flush=True)
    content = {"row": row.name, "made": made(), "runs": RUNS, "variants": found}
    return write_result(EXPLORED / f"{row.name}.json", content)


def agreement(row: Row, variant: Variant | Other) -> float:
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
    parser.add_argument("rows", nargs="+", choices=[name for name in ROWS if name.startswith(TUNING)])
    torch.set_num_threads(1)
    for row in parser.parse_args().rows:
        print(explore(ROWS[row]), flush=True)


if __name__ == "__main__":
    main()
