"""The command line: `segflow demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from .errors import SegflowError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="segflow", description="Which training data made a model behave as it does.")
    parser.add_argument("--version", action="version", version=f"segflow {metadata.version('segflow')}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the main job on real images: train, score groups, retrain, compare")
    demo.add_argument("--out", default="demo-output", help="folder for the run, the factors and the figure")
    demo.add_argument("--retrainings", type=int, default=5, help="retrainings of each of the 40 half-subsets")
    demo.add_argument("--processes", type=int, default=None, help="retrainings at a time; default: one for each core")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    try:
        digits = import_module("segflow.examples.digits")
        digits.main(options.out, options.retrainings, options.processes, False if options.quiet else None)
    except ModuleNotFoundError as problem:
        sys.stderr.write(f"segflow demo needs {problem.name}: pip install 'segflow[demo]'\n")
        return 1
    except SegflowError as problem:
        sys.stderr.write(f"segflow: {problem}\n")
        return 1
    return 0
