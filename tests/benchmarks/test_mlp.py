"""The benchmark runs; what it measures is not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_benchmark_prints_its_table_at_toy_size() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "mlp.py"
    size = ["--threads", "1", "--examples", "256", "--queries", "4", "--repetitions", "1"]
    done = subprocess.run([sys.executable, str(script), *size], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a bound did not hold, as it may at this size
    for row in ("covariance pass", "corrected-eigenvalue pass", "groups of 64", "singletons", "query products"):
        assert row in done.stdout
