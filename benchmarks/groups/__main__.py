"""The tables about groups. Each command goes on where it was stopped.

list              the rows, and which results are there
row ROW...        train, score, retrain, time: a JSON for each row and step
all               the same for every row, a million examples, then the table
table             docs/GROUPS.md from the JSON files
million           a million examples in a thousand groups: seconds and peak memory
"""

from __future__ import annotations

import argparse

from .detect import RESULTS, detect
from .million import PICTURE, million
from .retrain import retrain
from .runs import one_thread, record_run, say
from .settings import SETTINGS, Setting
from .table import write_table
from .timing import measure

STEPS = ("train", "detect", "retrain", "time")


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.groups", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("list", "row", "all", "table", "million"))
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--only", choices=STEPS, action="append", help="this step only (may be repeated)")
    parser.add_argument("--reuse", action="store_true", help="take scores that another state of the code made")
    parser.add_argument("--tiny", action="store_true", help="few examples, one epoch: to see that everything works")
    arguments = parser.parse_args()
    one_thread()
    unknown = [name for name in arguments.names if name not in SETTINGS]
    if unknown or (arguments.command == "row" and not arguments.names):
        parser.error(f"expected rows of {', '.join(SETTINGS)}; found {unknown or 'none'}")
    if arguments.command == "list":
        _list()
    elif arguments.command in ("row", "all"):
        for name in arguments.names or SETTINGS:
            setting = SETTINGS[name].tiny() if arguments.tiny else SETTINGS[name]
            run(setting, arguments.only or STEPS, arguments.reuse)
    if arguments.command in ("all", "million"):
        million(arguments.tiny, RESULTS / "million-tiny.png" if arguments.tiny else PICTURE)
    if arguments.command in ("all", "table"):
        print(write_table())


def run(setting: Setting, steps: tuple[str, ...] | list[str], reuse: bool = False) -> None:
    """The steps of one row."""
    if "train" in steps:
        for variant in ("noisy", "clean") if setting.retrained else ("noisy",):
            for seed in range(setting.runs):
                record_run(setting, variant, seed)
    if "detect" in steps:
        detect(setting, reuse)
    if "retrain" in steps and setting.retrained:
        retrain(setting, reuse)
    if "time" in steps:
        measure(setting)
    say(f"{setting.name}: done")


def _list() -> None:
    for name, setting in SETTINGS.items():
        steps = ("detect", *(("removal", "pruning", "pruning-accuracy") if setting.retrained else ()), "time")
        there = [step for step in steps if (RESULTS / f"{name}-{step}.json").exists()]
        missing = [step for step in steps if step not in there]
        print(f"{name}: results {', '.join(there) or 'none'}; missing {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
