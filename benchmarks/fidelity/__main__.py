"""`python -m benchmarks.fidelity list | fill NAME... | row NAME... | all | table`."""

from __future__ import annotations

import argparse
import time

import torch

from .rows import ROWS
from .training import bank_names, bank_of, fill


def main() -> None:
    """Run one command; each resumes where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("command", choices=("list", "fill", "row", "all", "table"))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ROWS)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    unknown = [name for name in arguments.names if name not in ROWS]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if arguments.command == "list":
        for name, row in ROWS.items():
            banks = {bank: len(bank_of(row, bank).missing) for bank in bank_names(row)}
            print(f"{name}: retrainings missing {banks}")
        return
    for name in arguments.names or ROWS:
        began = time.perf_counter()
        fill(ROWS[name])
        print(f"{name}: ground truth and runs in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
