"""What is committed beside a row's JSON, so that its figures can be checked without retraining: one file for each part.

NAME.safetensors, NAME being the row's with the stage's where it has two. M subsets, R retrainings, N examples of the
stage, Q queries, S recorded runs; WHAT is "halves", "tenth" or "hundredth", which is left out of the examples:

WHAT.measured       [M, R, Q], float32: the row's first measurement after each retraining
WHAT.kept           [M, ceil(N / 8)], uint8: the examples that each subset keeps, one bit each (`numpy.packbits`)
halves.predicted    [S, M, Q], float32: the change that the reference predicts if they are left out, of each run
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import segflow as sf

from .figures import agreement, ceiling, slope
from .parts import BANKS, HALVES, Part

LARGEST = 1_000_000  # bytes of a file


def committed_path(folder: Path, row: str, stage: str) -> Path:
    """Where the file of a row's part is."""
    return folder / f"{row}{'-' if stage else ''}{stage}.safetensors"


def commit(path: Path, part: Part, reference: Sequence[sf.Scores]) -> None:
    """Write the file of a part, given the reference's scores of each run."""
    arrays: dict[str, np.ndarray] = {}
    for what in BANKS:
        subsets, measured = part.left_out(what)
        arrays[f"{what}.measured"] = measured.astype(np.float32)
        arrays[f"{what}.kept"] = np.packbits(subsets, axis=1)
    left_out = (~part.subsets).astype(float)
    predicted = [left_out @ scores.values.double().numpy().T for scores in reference]
    arrays[f"{HALVES}.predicted"] = np.stack(predicted).astype(np.float32)
    save_file(arrays, path)
    size = path.stat().st_size
    assert size < LARGEST, f"{path}: {size:,} bytes, expected less than {LARGEST:,}. Give the row fewer retrainings."


def digest(measured: np.ndarray) -> str:
    """What tells retrainings from others: of float32, as they are committed."""
    return hashlib.sha256(np.ascontiguousarray(measured, dtype=np.float32).tobytes()).hexdigest()[:16]


def figures_of(path: Path) -> dict[str, Any]:
    """What follows from a part's file: the ceiling, and the reference's agreement and slope for halves."""
    arrays = load_file(path)
    measured = arrays[f"{HALVES}.measured"].astype(float)
    runs, alone = (
        [_as_scores(predicted) for predicted in arrays[f"{HALVES}.predicted"]],
        ~np.eye(len(measured), dtype=bool),
    )
    return {
        "retrainings": digest(arrays[f"{HALVES}.measured"]),
        "ceiling": ceiling(measured),
        **agreement(runs, alone, measured),
        "slope": slope(runs, alone, measured),
    }


def _as_scores(predicted_MQ: np.ndarray) -> sf.Scores:
    """Predicted changes as scores of what the subsets leave out, each a group of its own."""
    M, Q = predicted_MQ.shape
    queries, subsets = (tuple(map(str, range(count))) for count in (Q, M))
    return sf.Scores(torch.tensor(predicted_MQ.T), queries, subsets, (1,) * M)
