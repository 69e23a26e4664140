"""Checkpoints as people have them: folders, shards, tied tensors, names of wrappers, and an adapter's files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import segflow as sf

from ..support.helpers import mlp, perturbed_states

State = dict[str, Tensor]
ADAM = sf.OptimizerConstants("Adam")


def trajectory(*paths: Path, optimizer: Any = None, **options: Any) -> sf.Trajectory:
    steps = [10 * (place + 1) for place in range(len(paths))]
    return sf.Trajectory(paths, steps, 0.1, 12, optimizer, **options)


def assert_loads(path: Path, model: nn.Module, expected: State) -> None:
    trajectory(path).load_into(model, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def saved(path: Path, state: State) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in state.items()}, path)
    return path


def shards(folder: Path, state: State, suffix: str = "safetensors") -> Path:
    """The state in two files with an index, as transformers writes a large one."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    files = {name: f"{stem}-0000{1 + (place > 2)}-of-00002.{suffix}" for place, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: state[name] for name in names if files[name] == file}
        torch.save(part, folder / file) if suffix == "bin" else saved(folder / file, part)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def _safetensors(folder: Path, state: State) -> None:
    saved(folder / "model.safetensors", state)
    (folder / "config.json").write_text("{}")
    torch.save({}, folder / "optimizer.pt")


def _bin(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin")


FOLDERS: dict[str, Callable[[Path, State], Any]] = {
    "model.safetensors": _safetensors,
    "pytorch_model.bin": _bin,
    "sharded safetensors": shards,
    "sharded bin": lambda folder, state: shards(folder, state, "bin"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_read_as_from_pretrained_reads_it(kind: str, tmp_path: Path) -> None:
    [state] = perturbed_states(mlp(), 1)
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    FOLDERS[kind](folder, state)
    assert_loads(folder, mlp(), state)


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_digest_covers_every_file_that_is_read(kind: str, tmp_path: Path) -> None:
    state, other = perturbed_states(mlp(), 2)
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    FOLDERS[kind](folder, state)
    found = trajectory(folder)
    before = found.digest(0)
    for name in state:
        FOLDERS[kind](folder, state | {name: other[name]})
        assert found.digest(0) != before, name
    FOLDERS[kind](folder, state)
    assert found.digest(0) == before


def _both(folder: Path) -> None:
    saved(folder / "adapter_model.safetensors", {"a": torch.ones(1)})
    saved(folder / "model.safetensors", {"a": torch.ones(1)})


def _edited_index(edit: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shards(folder, mlp().state_dict())
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        index.write_text(json.dumps(content | {"weight_map": edit(content["weight_map"])}))

    return make


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing in it": (lambda folder: None, r"a folder without any of model.safetensors, .*adapter_model.bin\. Give"),
    "a model and an adapter": (_both, r"holds a model \(model.safetensors\) and an adapter \(adapter_model"),
    "a lost shard": (
        _edited_index(lambda m: m | {"x": "lost.safetensors"}),
        "lost.safetensors: no such checkpoint file",
    ),
    "a shard elsewhere": (_edited_index(lambda m: m | {"x": "../a.safetensors"}), "expected files beside it"),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "damaged"),
}


@pytest.mark.parametrize("what", ODD)
def test_a_folder_that_does_not_say_what_the_state_is_is_refused_at_once(what: str, tmp_path: Path) -> None:
    make, text = ODD[what]
    make(tmp_path)
    with pytest.raises(sf.TrajectoryError, match=text):
        trajectory(tmp_path)


@pytest.mark.parametrize("edit", [lambda m: m | {"x": m["0.bias"]}, lambda m: dict(list(m.items())[1:])])
def test_an_index_that_is_not_of_its_files_is_refused(edit: Any, tmp_path: Path) -> None:
    _edited_index(edit)(tmp_path)
    with pytest.raises(sf.TrajectoryError, match=r"index.json: the index and the files beside it differ in \['"):
        trajectory(tmp_path).state(0)


# Names of wrappers


PREFIXES: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DistributedDataParallel": lambda name: f"module.{name}",
    "compiled, in parallel": lambda name: f"module._orig_mod.{name}",
    "in parallel, compiled": lambda name: f"_orig_mod.module.{name}",
    "a layer compiled": lambda name: name.replace("0.", "0._orig_mod."),
}


@pytest.mark.parametrize("wrapper", PREFIXES)
def test_names_of_wrappers_are_those_of_the_model(wrapper: str, tmp_path: Path) -> None:
    """Of the state, of the second moments, and of the parameter groups."""
    [state], wrapped = perturbed_states(mlp(), 1), PREFIXES[wrapper]
    path = saved(tmp_path / "a.safetensors", {wrapped(name): value for name, value in state.items()})
    assert_loads(path, mlp(), state)
    moments = {name: value.square() for name, value in state.items()}
    of_moments = saved(tmp_path / "v.safetensors", {wrapped(name): value for name, value in moments.items()})
    groups = {wrapped(name): int("bias" in name) for name in state}
    found = trajectory(path, optimizer=ADAM, second_moments=[of_moments])
    model = mlp()
    seen = sf.Trajectory([path], [10], [[0.1, 0.2]] * 10, 12, ADAM, groups, second_moments=[of_moments]).of_model(model)
    assert seen.saved_moments(0) == set(state)
    for trajectory_of_names in (found.of_model(model), seen):
        loaded = trajectory_of_names.second_moments(0)
        assert loaded is not None and all(torch.equal(loaded[name], value) for name, value in moments.items())
    assert [seen.group_of(name) for name in state] == [0, 1] * 3


def test_a_plain_state_loads_into_a_model_with_a_compiled_part(tmp_path: Path) -> None:
    [state] = perturbed_states(mlp(), 1)
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    trajectory(saved(tmp_path / "a.safetensors", state)).load_into(model, 0)
    assert torch.equal(model[0].weight, state["0.weight"])


class Modular(nn.Module):
    """A model whose own part is called as a parallel wrapper calls what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def test_a_module_of_that_name_is_the_models_own(tmp_path: Path) -> None:
    [state] = perturbed_states(Modular(), 1)
    assert_loads(saved(tmp_path / "a.safetensors", state), Modular(), state)
    assert_loads(saved(tmp_path / "b.safetensors", {f"module.{n}": v for n, v in state.items()}), Modular(), state)
    seen = trajectory(tmp_path / "a.safetensors", parameter_groups={"module.weight": 0}).of_model(Modular())
    assert seen.group_of("module.weight") == 0 and seen.group_of("weight") is None


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    [state] = perturbed_states(mlp(), 1)
    path = saved(tmp_path / "a.safetensors", state | {"_orig_mod.0.bias": state["0.bias"]})
    with pytest.raises(sf.TrajectoryError, match=r"holds '0\.bias' twice"):
        trajectory(path).load_into(mlp(), 0)


# Tied tensors


class Tied(nn.Module):
    """An embedding and a head that are one tensor, or two."""

    def __init__(self, tied: bool = True):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_a_file_without_one_of_two_tied_names_loads(tmp_path: Path) -> None:
    value = torch.arange(15.0).reshape(5, 3)
    for name in ("embed.weight", "head.weight"):
        assert_loads(
            saved(tmp_path / f"{name}.safetensors", {name: value}),
            model := Tied(),
            {"embed.weight": value, "head.weight": value},
        )
        assert model.head.weight is model.embed.weight


def test_a_name_that_is_missing_otherwise_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"embed.weight": torch.ones(5, 3)})
    with pytest.raises(
        sf.TrajectoryError, match=r"(?s)is of another model: .*Missing key\(s\) in state_dict: \"head.weight\""
    ):
        trajectory(path).load_into(Tied(tied=False), 0)


def test_two_values_for_one_tied_tensor_are_refused(tmp_path: Path) -> None:
    state = {"embed.weight": torch.ones(5, 3), "head.weight": torch.ones(5, 3)}
    state["head.weight"][4, 2] = 2
    path = saved(tmp_path / "a.safetensors", state)
    with pytest.raises(
        sf.TrajectoryError, match=r"different values for 'embed.weight' and 'head.weight', which are one"
    ):
        trajectory(path).load_into(Tied(), 0)
    assert_loads(path, Tied(tied=False), state)


def test_groups_and_second_moments_go_by_both_names_of_a_tied_tensor(tmp_path: Path) -> None:
    value = torch.rand(5, 3)
    state, moments = (saved(tmp_path / f"{n}.safetensors", {"embed.weight": value}) for n in "av")
    given = trajectory(state, optimizer=ADAM, parameter_groups={"embed.weight": 0}, second_moments=[moments])
    found = given.of_model(Tied())
    assert found.group_of("head.weight") == 0 and found.saved_moments(0) == {"embed.weight", "head.weight"}
    loaded = found.second_moments(0)
    assert loaded is not None and torch.equal(loaded["head.weight"], value)
    assert given.of_model(Tied(tied=False)).group_of("head.weight") is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_transformers_saves_of_a_tied_model_is_its_whole_state(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    trained, model = LlamaForCausalLM(config), LlamaForCausalLM(config)
    trained.save_pretrained(tmp_path / "checkpoint-4")
    assert "lm_head.weight" not in load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert_loads(tmp_path / "checkpoint-4", model, trained.state_dict())
    trained.save_pretrained(tmp_path / "sharded", max_shard_size="1KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert_loads(tmp_path / "sharded", LlamaForCausalLM(config), trained.state_dict())
