"""Ranks: collectives equal their definition on 1 to 4 ranks; who fails, ends or dies is named within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.runtime import sharding
from segflow.runtime.ranks import Ranks, balanced, current

from ..support.gang import Failed, Gang, free_port

COUNTS = [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)]
ODD = {
    "float64": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(7),
    "large": torch.arange(100_000, dtype=torch.int32),
}


def _all_collectives() -> list[str]:
    """Every claim that fails on this rank."""
    place, wrong = current(), []

    def claim(name: str, holds: bool) -> None:
        if not holds:
            wrong.append(f"rank {place.index} of {place.count}: {name}")

    own = place.index + 1.0
    total = sum(range(1, place.count + 1))
    with place.together("everything"):
        claim("main", place.main == (place.index == 0))
        for size in (1, 5000):  # within and beyond one packet
            claim("same", place.same([own, "x" * size, None]) == [1.0, "x" * size, None])
            claim(
                "gather",
                place.gather({"r": own, "x": "x" * size * place.index})
                == [{"r": r + 1.0, "x": "x" * size * r} for r in range(place.count)],
            )
        place.agree("equal things", {"a": 1})
        sums = [
            torch.full((3, 2), own),
            torch.full((2,), own, dtype=torch.float64),
            torch.full((40_000_00,), own),
            torch.tensor(own),
            torch.zeros(0),
            torch.full((4, 3), own).T,
        ]
        place.sum_(sums)
        claim("sum", all(bool((one == total).all()) for one in sums))
        for name, tensor in ODD.items():
            for source in range(place.count):
                found = place.broadcast(tensor if place.index == source else None, source)
                claim(f"broadcast {name}", found.dtype == tensor.dtype and torch.equal(found, tensor))
            mine = tensor[: place.index] if tensor.ndim else tensor
            found = place.collect(None if place.index == 2 else mine)
            if place.main:
                expected = [None if r == 2 else tensor[:r] if tensor.ndim else tensor for r in range(place.count)]
                claim(f"collect {name}", _equal(found, expected))
            else:
                claim("collect elsewhere", found == [])
            dealt = [None if r == 1 else tensor for r in range(place.count)]
            got = place.deal(dealt if place.main else [None] * place.count, torch.device("cpu"))
            claim(f"deal {name}", _equal([got], [dealt[place.index]]))
    claim(
        "share",
        place.share(range(7)) == list(range(7)[place.index :: place.count]),
    )
    return wrong


def _equal(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return len(found) == len(expected) and all(
        (a is None and b is None) or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("count", COUNTS)
def test_every_collective_equals_its_definition(gang: Gang, count: int) -> None:
    assert gang.run(count, _all_collectives) == [[]] * count


def _disagree() -> None:
    with current().together("fit"):
        current().agree("the seed", 5 if current().index < 2 else 6)


def test_ranks_that_were_given_different_things_are_told_both(gang: Gang) -> None:
    for found in gang.run(3, _disagree):
        assert found.kind == "RankError"
        assert "the seed: not the same on every rank. Rank 0 has 5, rank 2 has 6" in found.text


def _different_calls() -> None:
    with current().together("fit" if current().main else "score"):
        pass


def test_ranks_at_different_calls_are_told_so(gang: Gang) -> None:
    for found in gang.run(2, _different_calls):
        assert found.kind == "RankError" and "different calls: {0: 'fit', 1: 'score'}" in found.text


def _one_fails(then: str) -> Any:
    place = current()
    with place.together("fit"):
        place.gather(1)
        if place.index == 1:
            if then == "raise":
                raise sf.StoreError("the disk is full")
            if then == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if then == "kill 0":
                time.sleep(1)
            if then == "exit":
                sys.exit(3)
        if place.index == 0 and then == "kill 0":
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(200):
            place.sum_([torch.ones(1000)])
            place.gather("on and on")
        place.gather(2)


@pytest.mark.parametrize(
    ("then", "culprit", "says"),
    [
        ("raise", 1, "failed: StoreError: the disk is full"),
        ("kill", 1, "has died"),
        ("kill 0", 0, "has died"),
        ("exit", 1, "failed: SystemExit: 3"),
    ],
)
def test_a_rank_that_fails_or_dies_ends_the_others_by_name(gang: Gang, then: str, culprit: int, says: str) -> None:
    begun = time.monotonic()
    found = gang.run(3, _one_fails, then)
    assert time.monotonic() - begun < 45
    for rank, one in enumerate(found):
        assert isinstance(one, Failed)
        if rank != culprit:
            assert one.kind == "RankError", one
            assert f"fit: rank {culprit} (process" in one.text and says in one.text, one.text


def _one_is_stopped() -> None:
    """Rank 1 stops itself in the middle of a call; rank 0 wakes it once its own call has ended."""
    place = current()
    with place.together("fit"):
        [_, pid] = place.gather(os.getpid())
        if not place.main:
            os.kill(pid, signal.SIGSTOP)
        try:
            place.sum_([torch.ones(1000)])
        finally:
            if place.main:
                os.kill(pid, signal.SIGCONT)


def test_a_rank_that_is_stopped_ends_the_others_after_the_bound(gang: Gang) -> None:
    first, second = gang.run(2, _one_is_stopped, SEGFLOW_RANK_TIMEOUT="1")
    assert first.kind == "RankError" and "fit: the connection between the ranks broke" in first.text
    assert "kept the others waiting for 1 s (SEGFLOW_RANK_TIMEOUT)" in first.text
    assert second.kind == "RankError"


def _one_hangs_elsewhere() -> None:
    from torch import distributed

    place = current()
    with place.together("score"):
        if place.main:
            distributed.barrier()  # stands for what a sharded model's layers exchange
        raise sf.TaskError("the labels are wrong")


def test_a_rank_that_hangs_where_nobody_looks_learns_who_failed_when_that_rank_has_left(gang: Gang) -> None:
    first, second = gang.run(2, _one_hangs_elsewhere)
    assert second.kind == "TaskError" and first.kind == "RankError"
    assert "score: rank 1 (process" in first.text and "failed: TaskError: the labels are wrong" in first.text


def _one_comes_late() -> None:
    time.sleep(0 if current().main else 2)
    try:
        with current().together("fit"):
            pass
    finally:
        time.sleep(2 if current().main else 0)  # it hosts what the other reads


def test_a_rank_that_does_not_come_within_the_bound_is_named(gang: Gang) -> None:
    first, second = gang.run(2, _one_comes_late, SEGFLOW_RANK_TIMEOUT="1")
    assert first.kind == "RankError" and "fit: rank 1" in first.text and "did not call fit within 1 s" in first.text
    assert second.kind == "RankError" and "did not call fit within 1 s" in second.text


def _one_takes_no_part() -> str:
    place = current()
    if place.index == 1:
        return "done"
    with place.together("score"):
        return "together"


def test_a_rank_that_takes_no_part_is_named(gang: Gang) -> None:
    first, second = gang.run(2, _one_takes_no_part)
    assert second == "done"
    assert first.kind == "RankError" and "score: rank 1 (process" in first.text and "has ended" in first.text


def _all_fail_then_go_on() -> list[float]:
    place = current()
    for error in (sf.StoreError, KeyboardInterrupt):
        try:
            with place.together("fit"):
                if place.index == 1:
                    raise error("on one rank only")
                place.gather(1)
        except (sf.StoreError, sf.RankError, KeyboardInterrupt):
            pass
    with place.together("fit again"):
        return list(place.gather(place.index))


def test_after_an_error_that_the_script_caught_the_ranks_go_on_together(gang: Gang) -> None:
    assert gang.run(3, _all_fail_then_go_on) == [[0, 1, 2]] * 3


def _among_the_users_collectives() -> list[float]:
    from torch import distributed

    place, own = current(), torch.ones(4) * (current().index + 1)
    work = None
    with place.together("fit"):
        if place.main:  # the user's collectives are under way in another order on each rank
            work = distributed.all_reduce(own, async_op=True)
        found = place.gather(place.index)
        if not place.main:
            work = distributed.all_reduce(own, async_op=True)
    assert work is not None
    work.wait()
    return [*found, *own.tolist()]


def test_our_traffic_never_mixes_with_the_users(gang: Gang) -> None:
    assert gang.run(2, _among_the_users_collectives) == [[0, 1, 3, 3, 3, 3]] * 2


def _sharded() -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    full = {name: value.clone() for name, value in model.state_dict().items()}
    fully_shard(model, mesh=init_device_mesh("cpu", (current().count,)))
    twice = {name: 2 * value for name, value in full.items()}
    same = all(torch.equal(sharding.whole(value), full[name]) for name, value in model.state_dict().items())
    model.load_state_dict(sharding.laid_out(twice, model))
    doubled = all(torch.equal(sharding.whole(value), twice[name]) for name, value in model.state_dict().items())
    return [sharding.is_sharded(model), sharding.is_sharded(nn.Linear(2, 2)), same, doubled]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_parameters_are_put_together_and_laid_out_again(gang: Gang, count: int) -> None:
    assert gang.run(count, _sharded) == [[True, False, True, True]] * count


def test_work_is_balanced_by_cost() -> None:
    assert balanced([], 3) == [] and balanced([5.0], 4) == [0]
    costs = [9.0, 1, 1, 1, 8, 7, 3, 3]
    loads = [sum(c for c, owner in zip(costs, balanced(costs, 3), strict=True) if owner == rank) for rank in range(3)]
    assert max(loads) <= 12 and sum(loads) == sum(costs)


def test_alone_needs_no_launcher() -> None:
    place = current()
    assert (place.index, place.count) == (0, 1) and isinstance(place, Ranks)
    with place.together("fit"):
        assert place.gather(5) == [5]


@pytest.mark.parametrize("launcher", ["accelerate.commands.launch --multi_gpu", "torch.distributed.run"])
def test_a_plain_script_under_a_launcher_is_all_ranks(tmp_path: Path, launcher: str) -> None:
    """`--multi_gpu` without a GPU starts processes over gloo; `--cpu` starts one process only (accelerate 1.15)."""
    script = tmp_path / "script.py"
    script.write_text(
        "from segflow.runtime.ranks import current\n"
        "place = current()\n"
        "with place.together('script'):\n"
        "    print(f'ranks {place.gather(place.index)}\\n', end='', flush=True)\n"
    )
    options = ["--num_processes", "2", "--main_process_port", str(free_port()), "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if "torch" in launcher:
        options = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, "-m", *launcher.split(), *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.count("ranks [0, 1]") == 2, done.stderr
