"""Fit and score on several ranks: the numbers of one process, for any share of the work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import segflow as sf
from segflow.runtime.ranks import current
from segflow.scoring.tiles import shares
from segflow.store import files

from ..support.gang import Failed, Gang
from ..support.helpers import ConvNet, analyzer_of, images, mlp, perturbed_states, trajectory_of, vectors

N, QUERIES = 23, 5
UNEVEN = [[0, 3, 5], list(range(6, 21)), [1], [2, 4], [21, 22]]
METHODS: dict[str, Any] = {
    "source": sf.Source(segments=2),
    "influence": sf.InfluenceFunction(),
    "tracin": sf.TracIn(),
    "cosine": sf.GradientCosine(),
}


class Deep(nn.Module):
    """Blocks that can be sharded one by one and recomputed in the backward."""

    def __init__(self, recompute: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


MODELS: dict[str, Any] = {"mlp": mlp, "conv": ConvNet, "deep": Deep, "recomputed": lambda: Deep(recompute=True)}


def _sharded(model: nn.Module, half: bool = False) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (current().count,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if half else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)  # type: ignore[return-value]


def run(
    folder: str,
    store: str,
    *,
    kind: str = "mlp",
    method: str = "source",
    memory: int = 2 << 30,
    batch_size: int = 4,
    groups: list[list[int]] | None = None,
    sharded: bool = False,
    half: bool = False,
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """The scores, and those of the parts, as a user's script computes them on every rank."""
    root, make = Path(folder), images if kind == "conv" else vectors
    model = MODELS[kind]().to(dtype)
    states = perturbed_states(model, 3)
    trajectory = trajectory_of(root / f"run-{current().index}", states, N)
    if sharded:
        model = _sharded(model, half)
    train, query = make(N, dtype), make(QUERIES, dtype, seed=5)
    task = sf.tasks.Classification()
    analyzer = analyzer_of(model, trajectory, root / store, task, method=METHODS[method], memory=memory)
    analyzer.check(train, query, curvature_tolerance=float("inf"))
    analyzer.fit(train, batch_size=batch_size)
    chosen = sf.Groups.from_lists(UNEVEN if groups is None else groups, N, partial=groups is not None)
    scores = analyzer.score(chosen, train, query, batch_size=batch_size, keep=("term", "layer"))
    parts = [*scores.by_term.values(), *scores.by_layer.values()]
    return [part.tolist() for part in (scores.values, *parts)]


def _agree(gang: Gang, folder: Path, counts: list[int], tolerance: float = 1e-10, **options: Any) -> list[Any]:
    alone = run(str(folder), "alone", **{**options, "sharded": False, "half": False})
    for count in counts:
        found = gang.run(count, _run, str(folder), f"store-{count}", options)
        for rank, one in enumerate(found):
            assert not isinstance(one, Failed), f"rank {rank} of {count}: {one.text}\n{one.trace}"
            assert one == found[0], "every rank has the same numbers"
        for mine, expected in zip(found[0], alone, strict=True):
            torch.testing.assert_close(
                torch.tensor(mine), torch.tensor(expected), rtol=tolerance, atol=tolerance * 1e-2
            )
    return alone


def _run(folder: str, store: str, options: dict[str, Any]) -> list[Any]:
    return run(folder, store, **options)


MORE = pytest.param([3, 4], marks=pytest.mark.slow)  # ranks beyond two


@pytest.mark.parametrize("counts", [[2], MORE])
@pytest.mark.parametrize(("kind", "method"), [("mlp", "source"), ("conv", "influence"), ("mlp", "tracin")])
def test_several_ranks_get_the_numbers_of_one_process(
    gang: Gang, tmp_path: Path, kind: str, method: str, counts: list[int]
) -> None:
    _agree(gang, tmp_path, counts, kind=kind, method=method)


@pytest.mark.parametrize("counts", [[2], pytest.param([3], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {"groups": [[4, 9]]},  # more ranks than groups; the group is cut into pieces
        {"groups": [[7]]},  # ranks without any group
        {"batch_size": 100},  # ranks without any batch
        {"memory": 8000},  # queries stay apart on their ranks
        {"memory": 3000, "groups": [[i] for i in range(N)]},  # single examples meet queries that go round
        {"memory": 8000, "groups": [[4, 9]], "method": "cosine"},  # whole groups only, so ranks without any
    ],
    ids=["cut group", "no group", "no batch", "queries apart", "singletons and queries apart", "cosine"],
)
def test_any_share_of_the_work_gives_the_same_numbers(
    gang: Gang, tmp_path: Path, options: dict[str, Any], counts: list[int]
) -> None:
    _agree(gang, tmp_path, counts, **options)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"kind": "deep", "sharded": True}, 1e-10),
        ({"kind": "deep", "sharded": True, "batch_size": 8, "memory": 6000}, 1e-10),
        ({"kind": "recomputed", "sharded": True}, 1e-10),
        ({"kind": "deep", "sharded": True, "half": True, "dtype": torch.float32, "method": "tracin"}, 0.1),
    ],
    ids=["plain", "idle batches and queries apart", "recomputed", "bfloat16"],
)
def test_a_sharded_model_gives_the_numbers_of_a_whole_one(
    gang: Gang, tmp_path: Path, options: dict[str, Any], tolerance: float
) -> None:
    _agree(gang, tmp_path, [2], tolerance, **options)


RECIPE: dict[str, Any] = {"weight_decay": 0.3, "eps": 1e-3, "batch_size": 5, "lr": 0.01}
PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (sf.Source(segments=2), {"name": "AdamW", "recorded": True}),
    "Adam, its decay coupled": (sf.Source(segments=2), {"name": "Adam", "recorded": True}),
    "AdamW in the diagonal form": (
        sf.Source(segments=2, preconditioner="diagonal"),
        {"name": "AdamW", "recorded": True},
    ),
    "AdamW, moments estimated": (sf.Source(segments=2), {"name": "AdamW"}),
    "Adagrad, moments estimated": (sf.Source(segments=2, fast=True), {"name": "Adagrad"}),
    "fast": (sf.Source(segments=2, fast=True), {}),
    "automatic": (sf.Source(segments="auto", penalty=0.02), {}),
    "kfac": (sf.InfluenceFunction(curvature="kfac"), {}),
    "diagonal": (sf.InfluenceFunction(curvature="diagonal"), {}),
    "trak": (sf.TRAK(5, 0.01), {}),
    "fisher": (sf.ProjectedFisher(5), {}),
    "lissa": (sf.LiSSA(2.0, steps=3, sample_size=5), {}),
    "cosine": (sf.GradientCosine(), {}),
    "representation": (sf.RepresentationSimilarity(), {}),
    "the first of two stages": (sf.Source(segments=2), {"stages": True}),
    "two runs": (sf.Source(segments=2), {"runs": 2}),
}
SOME = ["AdamW", "fast", "kfac", "trak", "cosine", "representation"]  # what other shares of the work could change


def _trajectory(folder: Path, states: list[dict[str, Tensor]], recorded: bool = False, **constants: Any) -> Any:
    generator = torch.Generator().manual_seed(11)
    moments = [
        {
            name: 1e-3 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
            for name, value in state.items()
        }
        for state in states
    ]
    return trajectory_of(folder, states, N, second_moments=moments if recorded else None, **{**RECIPE, **constants})


def _run_plans(root: Path, kind: str, options: dict[str, Any]) -> list[sf.Trajectory]:
    """Checkpoints of their own for each run and stage, three of each."""
    constants = {name: value for name, value in options.items() if name not in ("stages", "runs")}
    places = range(max(options.get("runs", 1), 1 + options.get("stages", False)))
    states = perturbed_states(MODELS[kind](), 3 * len(places))
    made = [_trajectory(root / f"{place}", states[3 * place : 3 * place + 3], **constants) for place in places]
    if "stages" in options:
        named = [
            sf.Trajectory(one.checkpoints, one.steps, 0.01, N, one.optimizer, stage=stage)
            for one, stage in zip(made, ("pretrain", "finetune"), strict=True)
        ]
        return [named[1].after(named[0])]
    return made


def _plans(folder: str, names: list[str], sharded: bool = False, memory: int = 2 << 30, kind: str = "mlp") -> Any:
    """For each plan the numbers of its scores and of all their parts."""
    found: dict[str, list[Any]] = {}
    for name in names:
        method, options = PLANS[name]
        root, model = Path(folder) / name, MODELS[kind]()
        runs = _run_plans(root / f"run-{current().index}", kind, options)
        if sharded:
            model = _sharded(model)
        task = sf.tasks.Classification("margin")
        analyzer = analyzer_of(model, runs, root / "store", task, method=method, memory=memory)
        stage = "pretrain" if "stages" in options else None
        train: Any = {"pretrain": vectors(N), "finetune": vectors(N, seed=3)} if stage else vectors(N)
        analyzer.fit(train, batch_size=4)
        groups, query = sf.Groups.from_lists(UNEVEN, N), vectors(QUERIES, seed=5)
        scores = analyzer.score(groups, train, query, batch_size=4, stage=stage, keep=("term", "layer", "run"))
        parts = [*scores.by_term.values(), *scores.by_layer.values(), *scores.by_run.values()]
        parts += [] if scores.spread is None else [scores.spread]
        found[name] = [part.tolist() for part in (scores.values, *parts)]
    return found


@pytest.mark.parametrize(
    ("count", "names", "options"),
    [
        (2, list(PLANS), {}),
        pytest.param(3, [*SOME, "AdamW, moments estimated", "the first of two stages"], {}, marks=pytest.mark.slow),
        (2, [*SOME, "fisher", "lissa"], {"memory": 12000}),  # queries stay apart on their ranks
        (2, ["AdamW", "automatic"], {"kind": "deep", "sharded": True}),
        pytest.param(
            2,
            [*SOME, "automatic", "AdamW, moments estimated"],
            {"kind": "deep", "sharded": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two ranks", "three ranks", "queries apart", "sharded", "more of them sharded"],
)
def test_every_plan_has_the_numbers_of_one_process(
    gang: Gang, tmp_path: Path, count: int, names: list[str], options: dict[str, Any]
) -> None:
    kind, sharded, memory = options.get("kind", "mlp"), options.get("sharded", False), options.get("memory", 2 << 30)
    [alone] = gang.run(1, _plans, str(tmp_path / "alone"), names, False, 2 << 30, kind, timeout=200)
    assert not isinstance(alone, Failed), alone.trace
    for one in gang.run(count, _plans, str(tmp_path / "ranks"), names, sharded, memory, kind, timeout=200):
        assert not isinstance(one, Failed), f"{one.text}\n{one.trace}"
        for name in names:
            for mine, expected in zip(one[name], alone[name], strict=True):
                theirs = torch.tensor(expected)
                torch.testing.assert_close(
                    torch.tensor(mine),
                    theirs,
                    rtol=1e-10,
                    atol=1e-12 * theirs.abs().max().item(),
                    msg=lambda text, name=name: f"{name}: {text}",
                )


def test_a_group_is_cut_only_where_several_ranks_share_it() -> None:
    groups = sf.Groups.from_lists(UNEVEN, N)
    [alone] = shares(groups, 1)
    assert [piece.members.tolist() for piece in alone] == UNEVEN
    dealt = shares(groups, 3)
    sizes = [sum(len(piece.members) for piece in own) for own in dealt]
    assert sum(sizes) == N and max(sizes) - min(sizes) <= 2
    for group, members in enumerate(UNEVEN):
        pieces = [piece.members for own in dealt for piece in own if piece.group == group]
        assert sorted(torch.cat([torch.as_tensor(piece) for piece in pieces]).tolist()) == members


def _content(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in (store / "units").rglob("*") if p.is_file()}


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_ranks_and_seeds_end_in_the_same_bytes(gang: Gang, tmp_path: Path, count: int) -> None:
    for store in ("first", "second"):
        assert not any(isinstance(one, Failed) for one in gang.run(count, _run, str(tmp_path), store, {}))
    assert _content(tmp_path / "first") == _content(tmp_path / "second")


@pytest.mark.parametrize(
    ("first", "second"), [(2, 3), *(pytest.param(*counts, marks=pytest.mark.slow) for counts in ((1, 3), (3, 1)))]
)
def test_a_run_goes_on_with_another_number_of_ranks_and_does_only_what_is_missing(
    gang: Gang, tmp_path: Path, first: int, second: int
) -> None:
    whole = gang.run(first, _run, str(tmp_path), "store", {})[0]
    before = _content(tmp_path / "store")
    gone = [name for number, name in enumerate(sorted(before)) if number % 3 == 1]
    for name in gone:
        (tmp_path / "store" / name).unlink()
    found = gang.run(second, _run, str(tmp_path), "store", {})
    after = _content(tmp_path / "store")
    for mine, expected in zip(found[0], whole, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=1e-10, atol=1e-12)
    rest = {name: content for name, content in before.items() if name not in gone and "covariance" in name}
    assert rest.items() <= after.items()
    shutil.rmtree(tmp_path / "store")


def _other_groups(folder: str) -> None:
    place, model = current(), mlp()
    trajectory = trajectory_of(Path(folder) / f"run-{place.index}", perturbed_states(model, 1), N)
    analyzer = analyzer_of(model, trajectory, Path(folder) / "store", method=sf.TracIn())
    analyzer.score(sf.Groups.random(N, 4, seed=place.index), vectors(N), vectors(2))


def _other_data(folder: str) -> None:
    place, model = current(), mlp()
    trajectory = trajectory_of(Path(folder) / f"run-{place.index}", perturbed_states(model, 1), N)
    analyzer = analyzer_of(model, trajectory, Path(folder) / "store", method=sf.InfluenceFunction())
    analyzer.fit(vectors(N, seed=place.index))


@pytest.mark.parametrize(
    ("job", "says"), [(_other_groups, "the groups"), (_other_data, "some examples of the training")]
)
def test_ranks_with_groups_or_data_of_their_own_are_refused(gang: Gang, tmp_path: Path, job: Any, says: str) -> None:
    for found in gang.run(2, job, str(tmp_path)):
        assert found.kind == "RankError" and says in found.text and "same seed" in found.text


def _recorded(folder: str, sharded: bool) -> list[Any]:
    model = Deep()
    if sharded:
        model = _sharded(model)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = vectors(N).tensors
    with sf.record(model, optimizer, folder, dataset_size=N, total_steps=4, checkpoints=2):
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    trajectory = sf.Trajectory.load(folder)
    return [trajectory.steps, {name: value.tolist() for name, value in trajectory.state(1).items()}]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_is_recorded_once_by_all_ranks_and_whole(gang: Gang, tmp_path: Path, sharded: bool) -> None:
    [alone] = gang.run(1, _recorded, str(tmp_path / "alone"), False)
    for found in gang.run(2, _recorded, str(tmp_path / "together"), sharded):
        assert not isinstance(found, Failed), found.trace
        assert found[0] == alone[0]
        for name, value in alone[1].items():
            torch.testing.assert_close(torch.tensor(found[1][name]), torch.tensor(value), rtol=1e-10, atol=1e-12)
    names = [sorted(f.name for f in (tmp_path / run / "checkpoints").iterdir()) for run in ("alone", "together")]
    assert names[0] == names[1]
    assert sorted(
        files.read_tensors(tmp_path / "alone" / "checkpoints" / names[0][0], None, sf.SegflowError)
    ) == sorted(files.read_tensors(tmp_path / "together" / "checkpoints" / names[0][0], None, sf.SegflowError))


def _recorded_in_stages(folder: str) -> list[Any]:
    model = mlp()
    x, y = vectors(N).tensors
    for stage, kind in (("pretrain", torch.optim.SGD), ("finetune", torch.optim.AdamW)):
        optimizer = kind(model.parameters(), lr=0.05)
        with sf.record(model, optimizer, folder, dataset_size=N, total_steps=4, checkpoints=2, stage=stage):
            for _ in range(4):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    loaded = sf.Trajectory.load(folder)
    return [
        [one.stage, one.steps, one.optimizer.name, one.digest(1), {n: v.tolist() for n, v in one.state(1).items()}]
        for one in loaded.stages
    ]


def test_stages_are_recorded_once_by_all_ranks_and_whole(gang: Gang, tmp_path: Path) -> None:
    [alone] = gang.run(1, _recorded_in_stages, str(tmp_path / "alone"))
    assert [stage[0] for stage in alone] == ["pretrain", "finetune"]
    for found in gang.run(2, _recorded_in_stages, str(tmp_path / "together")):
        assert not isinstance(found, Failed), found.trace
        assert found == alone
    assert sf.Trajectory.load(tmp_path / "together").second_moments(1)


def _retrained() -> list[Any]:
    return sf.evaluation.retrain(_count, sf.evaluation.random_subsets(3, 8), repetitions=2, processes=1).tolist()


def _count(kept: Any, seed: int) -> list[float]:
    return [float(len(kept)), float(seed)]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_retrainings_are_shared_out_to_the_ranks(gang: Gang, count: int) -> None:
    expected = _retrained()
    assert gang.run(count, _retrained) == [expected] * count


NODE = """
import json, sys
from pathlib import Path
from tests.runtime.test_distributed import run
from segflow.runtime.ranks import current
values = run(sys.argv[1], "store")[0]
Path(sys.argv[1], f"out-{current().index}.json").write_text(json.dumps(values))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip")
def test_two_nodes_with_addresses_of_their_own_get_the_numbers_of_one(tmp_path: Path) -> None:
    """Each node is a network namespace with two processes; a pair of virtual cables joins them."""
    names = [f"segflow{os.getpid()}{side}" for side in "ab"]
    (tmp_path / "script.py").write_text(NODE)

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "segv0", "netns", names[0], "type", "veth", "peer", "name", "segv1", "netns", names[1])
        nodes = []
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", f"segv{node}")
            for device in ("lo", f"segv{node}"):
                ip("-n", name, "link", "set", device, "up")
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            command += ["--nproc_per_node", "2", "--node_rank", str(node), "--master_addr", "10.77.0.1"]
            command += ["--master_port", "29577", str(tmp_path / "script.py"), str(tmp_path)]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": f"segv{node}", "PYTHONPATH": os.getcwd()}
            nodes.append(subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}))
        assert [node.wait(180) for node in nodes] == [0, 0]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
    alone = torch.tensor(run(str(tmp_path), "alone")[0])
    for rank in range(4):
        found = torch.tensor(json.loads((tmp_path / f"out-{rank}.json").read_text()))
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)
