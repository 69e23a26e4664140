"""The command line: `segflow demo` and `segflow store`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence

from .demo import run_demo
from .errors import SegflowError
from .store.lock import holder
from .store.maintenance import BROKEN, Finding, collect_garbage, repair, survey
from .store.store import Store
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 where something failed or is damaged."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "store":
            return _store(options)
        run_demo(options.out, options.retrainings, options.processes, False if options.quiet else None)
        return 0
    except SegflowError as problem:
        sys.stderr.write(f"segflow: {problem}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segflow", description="Which training data made a model behave as it does.")
    parser.add_argument("--version", action="version", version=f"segflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the main job on real images: train, score groups, retrain, compare")
    demo.add_argument("--out", default="demo-output", help="folder for the run, the factors and the figure")
    demo.add_argument("--retrainings", type=int, default=5, help="retrainings of each of the 40 half-subsets")
    demo.add_argument("--processes", type=int, default=None, help="retrainings at a time; default: one for each core")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    store = commands.add_parser("store", help="look after a store of factors and scores")
    tools = store.add_subparsers(dest="tool", required=True)
    helps = {
        "ls": "list what is there, what it was made from, and what is stale",
        "verify": "read everything and verify the checksums; status 1 if something is damaged or missing",
        "gc": "remove leftovers, orphans and stale units",
        "repair": "set damaged and missing units aside, so that the next run makes them anew",
    }
    for name, text in helps.items():
        tool = tools.add_parser(name, help=text)
        tool.add_argument("folder", help="the folder that was given as store=")
        tool.add_argument("--json", action="store_true", help="one JSON object a line")
        if name == "gc":
            tool.add_argument("--scores", action="store_true", help="remove all scores as well")
            tool.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser


def _store(options: argparse.Namespace) -> int:
    store = Store(options.folder)
    if options.tool == "gc":
        found = collect_garbage(store, options.scores, options.dry_run)
        verb = "would be removed" if options.dry_run else "removed"
    elif options.tool == "repair":
        found, verb = repair(store), "set aside in quarantine/"
    else:
        found, verb = survey(store, thorough=options.tool == "verify"), ""
    _show(found, options.json)
    if not options.json:
        total = sum(one.bytes for one in found)
        sys.stdout.write(f"{len(found)} {verb or 'in all'}, {total:,} bytes\n")
        held = holder(store.root)
        if held is not None:
            state = "in use by" if held.process.is_alive() else "last used, and not let go of, by"
            sys.stdout.write(f"{_printable(f'{state} {held}')}\n")
    return int(options.tool == "verify" and any(one.state in BROKEN for one in found))


def _show(found: Iterable[Finding], as_json: bool) -> None:
    if as_json:
        lines = [json.dumps(one.as_json(), sort_keys=True) for one in found]
    else:
        rows = [(one.state, f"{one.bytes:,}", one.name, one.made_from) for one in found]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    sys.stdout.write("".join(f"{_printable(line)}\n" for line in lines))


def _printable(text: str) -> str:
    """The text with what would move a terminal's cursor, or cannot be encoded, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
