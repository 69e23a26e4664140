"""The fidelity table. Each command goes on where it was stopped.

list              the rows, and how many retrainings and results are missing
fill [ROW...]     the ground truth (retrained models) and the recorded full runs
row ROW...        fill, score with every method, compare: one JSON for each row
all               the same for every row, then the table
table             docs/FIDELITY.md from the JSON files
"""

from __future__ import annotations

import argparse
import time

import torch

from .rows import ROWS
from .scoring import RESULTS, evaluate
from .table import write_table
from .training import bank_names, bank_of, fill


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("list", "fill", "row", "all", "table"))
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument(
        "--methods",
        default="",
        metavar="TEXT",
        help="score only methods whose name holds this (or one of several, with | between)",
    )
    parser.add_argument("--runs", type=int, default=0, help="how many of the recorded runs; 0: all")
    parser.add_argument("--measurement", default="", help="of the row's others: 'loss' (classification)")
    parser.add_argument("--reuse", action="store_true", help="take scores that another state of the code made")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    unknown = [name for name in arguments.names if name not in ROWS]
    if unknown or (arguments.command == "row" and not arguments.names):
        parser.error(f"expected rows of {', '.join(ROWS)}; found {unknown or 'none'}")
    if arguments.command == "list":
        _list()
    elif arguments.command != "table":
        for name in arguments.names or ROWS:
            _run(name, arguments)
    if arguments.command in ("all", "table"):
        print(write_table())


def _list() -> None:
    for name, row in ROWS.items():
        missing = {bank: len(bank_of(row, bank).missing) for bank in bank_names(row)}
        result = "result" if (RESULTS / f"{name}.json").exists() else "no result"
        print(f"{name}: {result}, retrainings missing: {missing}")


def _run(name: str, arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    fill(ROWS[name])
    print(f"{name}: ground truth and runs in {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.command != "fill":
        path = evaluate(ROWS[name], arguments.methods, arguments.measurement, arguments.reuse, arguments.runs)
        print(f"{name}: {path} after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
