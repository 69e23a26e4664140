"""The fault suite: kills at random moments, hostile stores, a full disk, contention for the lock.

Deterministic by seed but for the scheduler; each test prints how many faults it made. Run it with `make test-faults`.
"""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import segflow as sf
from segflow.runtime.ranks import current
from segflow.store.store import Store

from ..support.gang import forkserver, free_port
from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N, KILLS_ALONE, KILLS_OF_TWO, HOSTILE = 21, 150, 60, 120
GROUPS = [[0, 3, 5], list(range(6, 21)), [1], [2, 4]]
BOUND = 60  # seconds after which a process that has not ended hangs
SEED = 0


def _run(folder: str, store: str, index: int = 0, count: int = 1, port: int = 0) -> None:
    """Fit and score; the first process leaves the scores beside the store."""
    torch.set_num_threads(1)
    if count > 1:
        address, bound = f"tcp://127.0.0.1:{port}", timedelta(seconds=20)
        torch.distributed.init_process_group("gloo", address, rank=index, world_size=count, timeout=bound)
        current()
        torch.distributed.barrier()  # from here on every rank knows the others; before, the launcher looks after them
    scores = _scored(Path(folder), Path(folder) / store)
    if index == 0:
        scores.save(Path(folder) / f"{store}.scores")
    if count > 1:
        torch.distributed.destroy_process_group()


def _scored(folder: Path, store: Path) -> sf.Scores:
    """Fit and score as every run of this file does."""
    files = sorted((folder / "run").glob("*.safetensors"))
    trajectory = sf.Trajectory(files, [10, 20, 30], 0.1, N)
    analyzer = analyzer_of(mlp(), trajectory, store, sf.tasks.Classification(), method=sf.Source(segments=2))
    analyzer.fit(vectors(N), batch_size=2)
    return analyzer.score(sf.Groups.from_lists(GROUPS, N), vectors(N), vectors(5, seed=5), batch_size=2)


@pytest.fixture(scope="module")
def start() -> Callable[..., list[Any]]:
    """Starts processes quickly: forked from one that has everything imported."""
    context = forkserver()

    def begin(folder: Path, store: str, count: int = 1) -> list[Any]:
        port = free_port()
        jobs = [
            context.Process(target=_run, args=(str(folder), store, i, count, port), daemon=True) for i in range(count)
        ]
        for job in jobs:
            job.start()
        return jobs

    return begin


def _content(store: Path) -> dict[str, bytes]:
    found = [path for part in ("manifest", "units") for path in (store / part).rglob("*")]
    return {str(path.relative_to(store)): path.read_bytes() for path in found if path.is_file()}


def _reference(folder: Path, start: Callable[..., list[Any]], count: int) -> tuple[dict[str, bytes], bytes, float]:
    trajectory_of(folder / "run", perturbed_states(mlp(), 3), N)
    for store in ("warm", "whole"):
        begun = time.monotonic()
        jobs = start(folder, store, count)
        for job in jobs:
            job.join(BOUND)
            assert job.exitcode == 0
    return _content(folder / "whole"), (folder / "whole.scores").read_bytes(), time.monotonic() - begun


def _ended(jobs: list[Any]) -> None:
    """Wait for every process; one that does not end in bounded time hangs."""
    deadline = time.monotonic() + BOUND
    for job in jobs:
        job.join(max(0.0, deadline - time.monotonic()))
        if job.exitcode is None:
            for other in jobs:
                other.kill()
            pytest.fail(f"a process still ran {BOUND} s after the kill")


def _committed(store: Path) -> dict[str, bytes]:
    """The units that have an entry."""
    content = _content(store)
    names = [name.removeprefix("manifest/").removesuffix(".json") for name in content if name.endswith(".json")]
    return {f"units/{name}.safetensors": content[f"units/{name}.safetensors"] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kills"), [(1, KILLS_ALONE), (2, KILLS_OF_TWO)])
def test_kills_at_random_moments_lose_nothing_and_end_in_the_same_bytes(
    tmp_path: Path, start: Callable[..., list[Any]], count: int, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, scores, seconds = _reference(tmp_path, start, count)
    dice = random.Random(SEED + count)
    done = finished = 0
    while done < kills:
        store = f"store-{finished}"
        while True:
            before = _committed(tmp_path / store)
            jobs = start(tmp_path, store, count)
            if done < kills:
                time.sleep(dice.uniform(0.0, 1.1 * seconds))
                victims = jobs if dice.random() < 0.3 else [dice.choice(jobs)]
                alive = [job for job in victims if job.exitcode is None]
                for job in alive:
                    os.kill(job.pid, signal.SIGKILL)
                done += bool(alive)
            _ended(jobs)
            after = _committed(tmp_path / store)
            assert before.items() <= after.items(), "something committed was lost or changed"
            if all(job.exitcode == 0 for job in jobs):
                break
        assert _content(tmp_path / store) == expected
        assert (tmp_path / f"{store}.scores").read_bytes() == scores
        shutil.rmtree(tmp_path / store)
        finished += 1
    with capsys.disabled():
        sys.stdout.write(f"\n{done} kills of {count} process(es), {finished} runs ended in the same bytes\n")


# Hostile stores


class _Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def _header(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def _attacks(dice: random.Random, outside: Path) -> dict[str, Callable[[Path], None]]:
    """Each changes one file of the store, its unit or its entry."""

    def overwrite(content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
        return lambda path: path.write_bytes(content(path.read_bytes()) if callable(content) else content) and None

    def flip(content: bytes) -> bytes:
        at = dice.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :]

    def replace(make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def run(path: Path) -> None:
            path.unlink()
            make(path)

        return run

    def move_away(path: Path) -> None:
        shutil.move(path.parent, outside / f"moved-{dice.random()}")
        path.parent.symlink_to(outside)

    pickled = io.BytesIO()
    torch.save({"x": torch.ones(2)}, pickled)
    two = {"dtype": "F32", "shape": [2]}
    return {
        "flip": overwrite(flip),
        "cut": overwrite(lambda content: content[: dice.randrange(len(content))]),
        "longer": overwrite(lambda content: content + bytes(dice.randrange(1, 99))),
        "empty": overwrite(b""),
        "huge header": overwrite(lambda content: struct.pack("<Q", 1 << 60) + content[8:]),
        "large header": overwrite(lambda content: struct.pack("<Q", 99_999_999) + content[8:]),
        "overlap": overwrite(
            _header({"a": two | {"data_offsets": [0, 8]}, "b": two | {"data_offsets": [4, 12]}}) + bytes(12)
        ),
        "hole": overwrite(_header({"a": two | {"data_offsets": [4, 12]}}) + bytes(12)),
        "beyond": overwrite(
            _header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}) + bytes(8)
        ),
        "overflow": overwrite(
            _header({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 8]}}) + bytes(8)
        ),
        "negative": overwrite(_header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}) + bytes(8)),
        "other tensors": overwrite(_header({"../x": two | {"data_offsets": [0, 8]}}) + bytes(8)),
        "pickle": overwrite(pickle.dumps(_Bomb(outside / "marker"))),
        "torch file": overwrite(pickled.getvalue()),
        "deep json": overwrite(b"[" * 200_000),
        "wrong json": overwrite(b'{"bytes": "x", "sha256": [], "made_from": 3, "inputs": {}}'),
        "names json": overwrite(
            b'{"bytes": 8, "sha256": "' + b"0" * 64 + b'", "made_from": {}, "inputs": {"../x": "0"}}'
        ),
        "sparse": replace(lambda path: (path.touch(), os.truncate(path, 1 << 34))),
        "link": replace(lambda path: path.symlink_to(outside / "canary")),
        "folder": replace(lambda path: path.mkdir()),
        "pipe": replace(os.mkfifo),
        "link of the folder": move_away,
    }


@pytest.mark.slow
def test_hostile_stores_are_refused_or_read_right(
    tmp_path: Path, start: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """In bounded memory, without executing anything, without touching what is outside."""
    expected, _, _ = _reference(tmp_path, start, 1)
    values = sf.Scores.load(tmp_path / "whole.scores").values
    dice, outside = random.Random(SEED), tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_bytes(expected["units/covariance/step-10.safetensors"])
    attacks = _attacks(dice, outside)
    outcomes = {"refused": 0, "right": 0}
    for number in range(HOSTILE):
        name = list(attacks)[number % len(attacks)]
        store = tmp_path / f"hostile-{number}"
        shutil.copytree(tmp_path / "whole", store)
        targets = sorted(path for path in store.rglob("*") if path.suffix in (".json", ".safetensors"))
        victim = dice.choice([path for path in targets if path.parent != store or "link of" not in name])
        attacks[name](victim)
        if dice.random() < 0.5 and victim.is_file() and "units" in victim.parts and victim.stat().st_size < 1 << 20:
            _forge(Store(store), victim)  # the checksum agrees with the hostile content
        canary = (outside / "canary").read_bytes()
        try:
            found = _scored(tmp_path, store)
        except sf.SegflowError:
            outcomes["refused"] += 1
        else:
            torch.testing.assert_close(found.values, values, rtol=1e-9, atol=0, msg=f"{name} on {victim}")
            outcomes["right"] += 1
        assert (outside / "canary").read_bytes() == canary and not (outside / "marker").exists(), name
        assert not (outside / "lock").exists()
        shutil.rmtree(store, ignore_errors=True)
    assert outcomes["refused"] >= HOSTILE // 3
    with capsys.disabled():
        sys.stdout.write(f"\n{HOSTILE} hostile stores of {len(attacks)} kinds: {outcomes}\n")


def _forge(store: Store, victim: Path) -> None:
    import hashlib

    name = victim.relative_to(store.root / "units").as_posix().removesuffix(".safetensors")
    entry = store.entry_path(name)
    content = json.loads(entry.read_text())
    if hasattr(content, "keys"):
        raw = victim.read_bytes()
        entry.write_text(json.dumps(content | {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}))


# A full disk, and contention


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="a small file system needs root to mount"
)
def test_a_full_disk_is_an_error_that_loses_nothing(
    tmp_path: Path, start: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _, _ = _reference(tmp_path, start, 1)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], check=True)
    errors = 0
    try:
        for size in range(16, 400, 8):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(small)], check=True)
            before = _committed(small)
            try:
                _scored(tmp_path, small)
            except sf.StoreError as problem:
                assert "the disk is full" in str(problem) and "committed before is kept" in str(problem)
                assert before.items() <= _committed(small).items()
                errors += 1
            else:
                break
        assert _content(small) == expected and errors > 3
    finally:
        gc.collect()  # files of analyzers that failed are open until then
        subprocess.run(["umount", str(small)], check=True)
    with capsys.disabled():
        sys.stdout.write(f"\n{errors} times the disk was full; the run then ended in the same bytes\n")


@pytest.mark.slow
def test_runs_that_want_one_store_at_a_time_get_it_one_at_a_time(
    tmp_path: Path, start: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    expected, scores, _ = _reference(tmp_path, start, 1)
    refused = rounds = 0
    for rounds in range(1, 6):
        store = f"wanted-{rounds}"
        jobs = [job for _ in range(5) for job in start(tmp_path, store)]
        _ended(jobs)
        refused += sum(job.exitcode != 0 for job in jobs)
        last = start(tmp_path, store)
        _ended(last)
        assert last[0].exitcode == 0 and _content(tmp_path / store) == expected
        assert (tmp_path / f"{store}.scores").read_bytes() == scores
    assert refused
    with capsys.disabled():
        sys.stdout.write(
            f"\n{rounds * 5} runs wanted a store, {refused} were refused; every store ended in the same bytes\n"
        )
