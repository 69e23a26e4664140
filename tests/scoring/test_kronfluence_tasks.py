"""The tasks of Kronfluence's examples run here unchanged, and give the scores that they give there.

Pseudo-labels are drawn by torch.multinomial and torch.normal; here both libraries are given the same ones, a fixed
function of the model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import segflow as sf

from ..support.helpers import analyzer_of, images, trajectory_of, vectors
from ..support.kronfluence_scores import kronfluence_scores
from ..support.kronfluence_tasks import (
    CifarClassification,
    GlueClassification,
    SwagMultipleChoice,
    UciRegression,
    WikiTextLanguageModel,
)

N, QUERIES, POSITIONS, WORDS = 18, 4, 6, 11
SMALL = {"vocab_size": WORDS, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}


class Rows(Dataset[Any]):
    """Examples as mappings."""

    def __init__(self, columns: dict[str, Tensor]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def tokens(n: int, seed: int) -> dict[str, Tensor]:
    """Sequences of which the last positions are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (n, POSITIONS), generator=generator)
    lengths = torch.randint(3, POSITIONS + 1, (n, 1), generator=generator)
    mask = (torch.arange(POSITIONS) < lengths).long()
    labels = torch.randint(0, 2, (n,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids), "labels": labels}


def text(n: int, seed: int) -> Rows:
    ids = tokens(n, seed)["input_ids"].clamp_min(1)
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def gpt2() -> nn.Module:
    """Whose Conv1D layers are made linear ones, as Kronfluence's example does."""
    import transformers

    options = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=WORDS, n_embd=8, n_head=2, n_layer=2, n_positions=POSITIONS, **options)
    )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)
                linear.load_state_dict({"weight": child.weight.T, "bias": child.bias})
                setattr(module, name, linear)
    return model


def bert() -> nn.Module:
    import transformers

    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, intermediate_size=8))


def convolutions() -> nn.Module:
    first, second = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 4, 3, bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(4, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1))


def numbers(n: int, seed: int) -> TensorDataset:
    data = vectors(n, seed=seed).tensors
    return TensorDataset(data[0], data[1][:, None].double())


Case = tuple[Any, Callable[[], nn.Module], Callable[[int, int], Any]]
CASES: dict[str, Case] = {
    "UCI": (UciRegression(), perceptron, numbers),
    "CIFAR": (CifarClassification(), convolutions, lambda n, seed: images(n, seed=seed)),
    "GLUE": (GlueClassification(), bert, lambda n, seed: Rows(tokens(n, seed))),
    "WikiText": (WikiTextLanguageModel(2), gpt2, text),
}


def fixed_labels(probabilities: Tensor, num_samples: int) -> Tensor:
    """In the place of torch.multinomial: labels that look random, and are a function of their row of probabilities."""
    assert num_samples == 1
    shares = (1e4 * probabilities[..., :1]).sin().abs()
    return (probabilities.cumsum(-1) < shares).sum(-1, keepdim=True).clamp_max(probabilities.shape[-1] - 1)


def fixed_noise(mean: Tensor, std: float) -> Tensor:
    """In the place of torch.normal."""
    return mean + std * 2**0.5 * (1e4 * mean).sin()


def both(folder: Path, case: str, damping: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """segflow's and Kronfluence's scores of every training example [QUERIES, N], at the same pseudo-labels."""
    task, make, data = CASES[case]
    torch.manual_seed(0)
    model = make().double().eval()
    train, query = data(N, 1), data(QUERIES, 2)
    monkeypatch.setattr(torch, "multinomial", fixed_labels)
    monkeypatch.setattr(torch, "normal", fixed_noise)
    monkeypatch.setattr(type(task), "draws_labels", False, raising=False)
    names = named_layers(model, task)
    trajectory = trajectory_of(folder / "run", [model.state_dict()], N)
    method = sf.InfluenceFunction("heuristic" if damping is None else damping)
    analyzer = analyzer_of(model, trajectory, folder / "store", task, method=method, exclude=names)
    analyzer.fit(train, batch_size=7)
    ours = analyzer.score(sf.Groups.singletons(N), train, query, batch_size=6).values
    return ours, kronfluence_scores(folder / "peer", task, model, train, query, "ekfac", damping)


def named_layers(model: nn.Module, task: Any) -> list[str]:
    """What Kronfluence does not attribute: all that is neither linear nor a convolution, where the task names none."""
    if task.get_influence_tracked_modules() is not None:
        return []
    kinds = (nn.Linear, nn.Conv2d)
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, kinds) and any(True for _ in module.parameters(recurse=False))
    ]


def test_a_task_that_joins_the_gradients_of_an_examples_rows_is_refused_by_name(tmp_path: Path) -> None:
    """SWAG's: Kronfluence has a gradient for each row of the model, segflow one for each example."""
    model = perceptron().double()
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)
    with pytest.raises(sf.TaskError, match="SwagMultipleChoice post-processes per-example gradients"):
        analyzer_of(model, trajectory, tmp_path / "store", SwagMultipleChoice())


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*share of the trained parameters.*:UserWarning")
@pytest.mark.parametrize("damping", [pytest.param(None, marks=pytest.mark.slow), 0.05])
@pytest.mark.parametrize(
    "case", [name if name in ("UCI", "WikiText") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_kronfluences_example_tasks_give_its_scores(
    case: str, damping: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both(tmp_path, case, damping, monkeypatch)
    assert ours.shape == theirs.shape and correlation(ours, theirs) > 0.9999
    torch.testing.assert_close(ours, theirs / N, rtol=1e-6, atol=1e-6 * ours.abs().max().item())
