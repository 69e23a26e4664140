"""Random subsets, and retraining on them in one process or several."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import segflow as sf
from segflow.evaluation import FunctionTraining, random_subsets, retrain
from segflow.evaluation.retraining.pool import checked_processes, workers_for


def test_random_subsets_keep_the_fraction_evenly_and_repeat_with_the_seed() -> None:
    subsets = random_subsets(400, 10, 0.3, seed=4)
    assert subsets.shape == (400, 10)
    assert subsets.dtype == bool
    assert (subsets.sum(1) == 3).all()
    assert abs(subsets.mean(0) - 0.3).max() < 0.1
    assert (subsets == random_subsets(400, 10, 0.3, seed=4)).all()
    assert (subsets != random_subsets(400, 10, 0.3, seed=5)).any()
    assert (random_subsets(3, 10).sum(1) == 5).all()


def test_coin_flip_subsets_keep_each_group_by_itself_and_never_none() -> None:
    subsets = random_subsets(4000, 4, 0.25, seed=4, fixed=False)
    sizes = np.bincount(subsets.sum(1), minlength=5)
    binomial = np.array([0, 0.421875, 0.2109375, 0.046875, 0.00390625]) / (1 - 0.31640625)
    np.testing.assert_allclose(sizes / 4000, binomial, atol=0.03)
    again = np.corrcoef(random_subsets(4000, 8, 0.5, fixed=False).T)
    assert np.abs(again - np.eye(8)).max() < 0.06, "groups of fixed subsets would have -1/7"
    assert (subsets == random_subsets(4000, 4, 0.25, seed=4, fixed=False)).all()
    assert (subsets != random_subsets(4000, 4, 0.25, seed=5, fixed=False)).any()
    with pytest.raises(sf.ScoreError, match="fixed=0: expected True or False"):
        random_subsets(3, 4, fixed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3, 10, 0.01), r"fraction=0\.01 keeps 0 of 10 groups: expected some, but not all"),
        ((3, 10, 1.0), r"fraction=1\.0 keeps 10 of 10 groups"),
        ((3, 10, -0.5), r"fraction=-0\.5 keeps -5 of 10"),
        ((0, 10), "count=0: expected a whole number, at least 1"),
    ],
)
def test_subsets_that_keep_all_or_nothing_are_refused(arguments: tuple, text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        random_subsets(*arguments)


def _tell(kept: np.ndarray, seed: int) -> list[float]:
    return [float(sum(2**k for k in kept)), float(seed), float(torch.get_num_threads())]


def _train(kept: np.ndarray, seed: int) -> torch.Tensor:
    """Ten steps of SGD on some examples: equal only if seeds, examples and rounding are. The result has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).split([299, 1], 1)
    weight = torch.randn(299, 1, generator=generator).requires_grad_()
    for _ in range(10):
        loss = (x[kept] @ weight - y[kept]).square().mean()
        weight = (weight - 0.001 * torch.autograd.grad(loss, weight)[0]).detach().requires_grad_()
    return (x @ weight)[:5, 0]


def _fail(kept: np.ndarray, seed: int) -> list[float]:
    raise FloatingPointError(f"diverged with {len(kept)} examples")


def _scalar(kept: np.ndarray, seed: int) -> float:
    return float(len(kept))


def test_each_subset_is_retrained_with_seeds_of_its_own_on_one_thread() -> None:
    subsets = np.array([[1, 0, 1], [0, 1, 1]], dtype=bool)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = retrain(_tell, subsets, repetitions=3, processes=1, seed=10, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found.shape == (2, 3, 3)
    assert found.dtype == np.float64
    assert found[..., 0].tolist() == [[5.0] * 3, [6.0] * 3]
    assert len(np.unique(found[..., 1])) == 6
    assert (found[..., 2] == 1).all()
    other = retrain(_tell, subsets, repetitions=3, processes=1, seed=11, progress=False)
    assert (found[..., 1] != other[..., 1]).all()
    assert retrain(_scalar, subsets, processes=1, progress=False).tolist() == [[[2.0]], [[2.0]]]


def test_one_and_two_processes_give_equal_results() -> None:
    subsets = random_subsets(3, 64)
    one, two = (retrain(_train, subsets, repetitions=2, processes=n, progress=False) for n in (1, 2))
    assert one.shape == (3, 2, 5)
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one[..., 0])) == 6


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_retraining_is_named_with_its_error(processes: int) -> None:
    with pytest.raises(
        sf.ScoreError, match=r"subset 0, repetition 0, 32 kept, seed \d+: FloatingPointError: diverged with 32"
    ) as caught:
        retrain(_fail, random_subsets(2, 64), processes=processes, progress=False)
    assert isinstance(caught.value.__cause__, FloatingPointError)


SUBSETS = random_subsets(3, 6)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda kept, seed: [1.0, np.nan], "measurement is not finite"),
        (lambda kept, seed: [1.0] * (1 + (0 in kept)), r"gave \[1, 2\] measurements"),
        (lambda kept, seed: None, "gave NoneType"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_measurements_that_are_no_numbers_are_refused(function: Any, text: str, processes: int) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        retrain(function, np.eye(4, dtype=bool), processes=processes, progress=False)


@pytest.mark.parametrize(
    ("count", "repetitions", "text"),
    [(0, 1, "there are none"), (2, 0, "repetitions=0: expected a whole number, at least 1")],
)
def test_nothing_to_retrain_is_refused(count: int, repetitions: int, text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        retrain(_tell, np.ones((count, 3), dtype=bool), repetitions=repetitions, processes=1)


def test_lists_of_indices_are_what_is_kept() -> None:
    """The sums of what is kept, and how many there are."""
    found = retrain(lambda k, s: [k.sum(), len(k)], [[0, 1, 2], [3, 4, 5], [0, 2, 4]], processes=1, progress=False)
    assert found[:, 0].tolist() == [[3, 3], [12, 3], [6, 3]]
    weights = np.array([[0.3, 0, 1.0]])
    with pytest.raises(sf.ScoreError, match="other numbers than 0 and 1"):
        retrain(lambda k, s: [1.0], weights, processes=1)


# ---- seeds ----


def _seeds(subsets: Any, repetitions: int, seed: int) -> np.ndarray:
    return retrain(lambda k, s: [float(s)], subsets, repetitions=repetitions, seed=seed, processes=1, progress=False)[
        ..., 0
    ].astype(int)


def test_studies_subsets_and_repetitions_have_seeds_of_their_own() -> None:
    subsets = random_subsets(100, 12)
    seeds = [_seeds(subsets, 5, seed) for seed in (0, 1, 2)]
    assert len(np.unique(seeds)) == 1500
    assert 0 <= np.min(seeds) < np.max(seeds) < 2**31
    assert not set(seeds[0].ravel()) & set(range(1000)), "no small numbers, which users' own generators begin at"


def test_a_subset_has_the_same_seeds_among_any_others() -> None:
    subsets = random_subsets(6, 12)
    seeds = _seeds(subsets, 3, 4)
    assert np.array_equal(_seeds(subsets[::-1], 2, 4), seeds[::-1, :2])
    repeated = _seeds(subsets[[0, 0, 1]], 3, 4)
    assert np.array_equal(repeated[[0, 2]], seeds[:2])
    assert not set(repeated[1]) & set(seeds.ravel()), "the same subset once more is another retraining"


def _of_global_generators(kept: np.ndarray, seed: int) -> list[float]:
    return [torch.nn.Linear(3, 1).weight.sum().item(), float(np.random.rand()), random.random()]  # noqa: NPY002


def test_a_function_that_forgets_its_seed_repeats_itself_and_moves_no_generator() -> None:
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    one, two, again = (
        retrain(_of_global_generators, random_subsets(4, 6), repetitions=2, processes=n, progress=False)
        for n in (1, 2, 1)
    )
    assert np.array_equal(one, two)
    assert np.array_equal(one, again)
    assert all(len(np.unique(one[..., of])) == 8 for of in range(3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    other = retrain(_of_global_generators, random_subsets(4, 6), repetitions=2, processes=1, seed=1, progress=False)
    assert not set(other.ravel()) & set(one.ravel())


# ---- processes ----


@pytest.mark.parametrize("processes", [0, -2, 1.5, "two"])
def test_a_number_of_processes_that_makes_no_sense_is_refused(processes: Any) -> None:
    for refused in (
        lambda: retrain(_tell, SUBSETS, processes=processes),
        lambda: FunctionTraining(_tell, {}, processes=processes),
    ):
        with pytest.raises(sf.ScoreError, match=r"processes=.*None or -1 takes one for each core"):
            refused()


def test_minus_one_and_none_are_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segflow.evaluation.retraining.pool.cores", lambda: 3)
    assert [workers_for(checked_processes(processes)) for processes in (-1, None, 2)] == [3, 3, 2]


def test_a_closure_goes_to_other_processes_and_what_cannot_be_sent_is_named() -> None:
    factor, lock = 2.0, threading.Lock()

    def locked(kept: np.ndarray, seed: int) -> list[float]:
        with lock:
            return [1.0]

    found = retrain(lambda kept, seed: [factor * len(kept), os.getpid()], SUBSETS, processes=2, progress=False)
    assert (found[..., 0] == 6).all()
    assert os.getpid() not in found[..., 1]
    with pytest.raises(sf.ScoreError, match=r"cannot be sent to other processes.*processes=1, or make what it holds"):
        retrain(locked, SUBSETS, processes=2, progress=False)
    assert retrain(locked, SUBSETS, processes=1, progress=False).shape == (3, 1, 1)


UNGUARDED = """
import numpy as np
from segflow import evaluation as ev

scale = 2.0
def local(kept, seed):
    return [scale * len(kept)]
print(ev.retrain(local, ev.random_subsets(4, 6, 0.5), processes=2, progress=False).ravel().tolist())
"""


@pytest.mark.parametrize("from_file", [True, False])
def test_an_unguarded_script_and_what_is_typed_in_run(tmp_path: Path, from_file: bool) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    arguments = [str(tmp_path / "script.py")] if from_file else ["-"]
    ran = subprocess.run(
        [sys.executable, *arguments], input=UNGUARDED, capture_output=True, text=True, timeout=100, check=False
    )
    assert (ran.returncode, ran.stdout.splitlines()) == (0, ["[6.0, 6.0, 6.0, 6.0]"]), ran.stderr


def _threads(kept: np.ndarray, seed: int) -> list[float]:
    """Threads of every library: those that are loaded, and those that would be."""
    loaded = [library["num_threads"] for library in threadpool_info()]
    return [float(max(loaded)), float(torch.get_num_threads()), float(os.environ.get("NUMEXPR_NUM_THREADS", "0"))]


def test_a_worker_has_one_thread_in_every_library() -> None:
    with threadpool_limits(2):
        found = retrain(_threads, SUBSETS, processes=2, progress=False)
        assert (found == 1).all()
        here = retrain(_threads, SUBSETS, processes=1, progress=False)
        assert (here[..., :2] == 1).all()
        assert max(library["num_threads"] for library in threadpool_info()) == 2


ORPHANS = """
import os, sys, time
import numpy as np
from segflow import evaluation as ev

def wait(kept, seed):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    time.sleep(60)
    return [1.0]
ev.retrain(wait, np.eye(2, dtype=bool), processes=2, progress=False)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ORPHANS)
    (tmp_path / "pids").mkdir()
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tmp_path / "pids")])
    deadline = time.monotonic() + 60
    while len(pids := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert all(psutil.pid_exists(pid) for pid in pids)
    workers = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_a_worker_that_is_killed_is_told() -> None:
    def ends(kept: np.ndarray, seed: int) -> list[float]:
        os._exit(3)

    with pytest.raises(
        sf.ScoreError, match=r"a worker process ended. Was there too little memory\? Give fewer processes"
    ):
        retrain(ends, SUBSETS, processes=2, progress=False)
