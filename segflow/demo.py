"""`segflow demo`: the main job on real images, as examples/digits.py tells it from top to bottom."""

from __future__ import annotations

from .errors import SegflowError


def run_demo(out: str, retrainings: int, processes: int | None, progress: bool | None) -> None:
    """Train, score groups, retrain, compare; see `main` in examples/digits.py for the arguments.

    Raises SegflowError where a package that the demo draws with, or the example itself, is not installed.
    """
    try:
        from .examples import digits
    except ModuleNotFoundError as problem:
        if str(problem.name).startswith("segflow"):
            raise SegflowError(
                "the demo is examples/digits.py, which is installed along with segflow, and this segflow runs from a "
                "source tree. Run `python examples/digits.py` there, or `pip install '.[demo]'`."
            ) from problem
        raise SegflowError(f"the demo needs {problem.name}. Run: pip install 'segflow[demo]'.") from problem
    digits.main(out, retrainings, processes, progress)
