"""The committed result files, `benchmarks/results`: compact JSON from which the documents' tables are written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
DIGITS = 6  # that are kept of a number
WIDTH = 240  # characters; what fits stands on one line


def made() -> dict[str, str]:
    """When and with which segflow a result is made, for its file."""
    from segflow.version import __version__

    return {"date": datetime.now(timezone.utc).date().isoformat(), "segflow": __version__}


def write_result(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a result; numbers keep six digits, and ends of intervals that are infinite (none is known) become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(_plain(content)) + "\n")
    return path


def read_result(path: Path) -> Any:
    """A result, or None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def observed(name: str) -> str:
    """A figure that was measured once, by hand: no script makes it. The file says when, and of what it is."""
    return str(json.loads((FOLDER / "observed.json").read_text())["figures"][name]["shown"])


def shown_made(found: Mapping[str, Any]) -> str:
    """When a result was made, as a sentence above its table."""
    if found.get("read_back"):
        return f"Made by {found['made']['date']}, read back from the table of that day."
    return f"Made {found['made']['date']} with segflow {found['made']['segflow']}."


def short_made(found: Mapping[str, Any]) -> str:
    """The same for a cell."""
    return f"{found['made']['date']}, read back" if found.get("read_back") else str(found["made"]["date"])


def shown_estimate(figures: Mapping[str, Any] | None, sign: str = "") -> str:
    """A number with its interval, if it has one; nothing where there is no number."""
    if not figures:
        return ""
    mean, interval = f"{figures['mean']:{sign}.3f}", shown_interval(figures, sign)
    return f"{mean} {interval}" if interval else mean


def shown_interval(figures: Mapping[str, Any], sign: str = "") -> str:
    """The interval of a number; nothing where it has none."""
    if figures["low"] is None or figures["high"] is None:
        return ""
    return f"[{figures['low']:{sign}.3f}, {figures['high']:{sign}.3f}]"


def _plain(value: Any) -> Any:
    """The same with what JSON has, and short numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _text(value: Any, indent: str = "") -> str:
    """JSON in which whatever fits stands on one line."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict) or len(indent) + len(line) <= WIDTH:
        return line
    deeper = indent + " "
    lines = [f"{deeper}{json.dumps(key, ensure_ascii=False)}: {_text(inner, deeper)}" for key, inner in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
