"""Factors and scores of ragged texts depend neither on how they were padded nor on how they were batched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.tasks.padding import Padding

from ..support.model_tasks import CLASSES, NO_LABEL, WORDS, Example, classed_data, masked_data, padded
from ..support.models import Case, N, Trained, bert_classifier, gpt2, llama, masked_bert, trained

PROMPT = 2  # words of a text that are no labels


def prompted(lengths: Sequence[int]) -> list[Example]:
    """Texts whose first words are a prompt, and whose last but one is no label either."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for length in lengths:
        words = torch.randint(1, WORDS, (length,), generator=generator)
        labels = words.clone()
        labels[:PROMPT] = labels[-2] = NO_LABEL
        examples.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return examples


def whole(lengths: Sequence[int]) -> list[Example]:
    """Texts of which each word is a label."""
    return [{**example, "labels": example["input_ids"]} for example in prompted(lengths)]


def tagged(lengths: Sequence[int]) -> list[Example]:
    """Texts with a class for each word but the first."""
    examples = prompted(lengths)
    for example in examples:
        example["labels"] = example["input_ids"] % CLASSES
        example["labels"][0] = NO_LABEL
    return examples


def bert_tagger() -> Any:
    from transformers import BertForTokenClassification

    return BertForTokenClassification(bert_classifier().config)


def unmasked(collate: Callable[[Any], Mapping[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Batches without an attention mask, as of models that see nothing after a word."""
    return partial(_without_mask, collate)


def _without_mask(collate: Callable[[Any], Mapping[str, Any]], examples: Any) -> dict[str, Any]:
    return {key: value for key, value in collate(examples).items() if key != "attention_mask"}


def wider(examples: Sequence[Example], collate: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, Any]:
    """A batch with a column of padding more than it needs."""
    long = {key: torch.zeros(10, dtype=value.dtype) if value.ndim else value for key, value in examples[0].items()}
    return {key: value[:-1] for key, value in collate([*examples, long]).items()}


causal = partial(sf.tasks.CausalLM, measurement="log_probability")
CASES = {
    "gpt2": Case(gpt2, causal("batch token mean", mean_tokens=3.0), prompted, padded),
    "gpt2, no mask": Case(gpt2, causal(), prompted, unmasked(padded)),
    "llama, padded left": Case(llama, causal("token sum"), prompted, Padding(side="left")),
    "llama, padded left, each word a label": Case(llama, causal(), whole, Padding(side="left")),
    "bert, masked words": Case(masked_bert, sf.tasks.MaskedLM(), masked_data, padded),
    "bert, a class for each word": Case(bert_tagger, sf.tasks.TokenClassification(), tagged, padded),
    "bert, a class": Case(bert_classifier, sf.tasks.SequenceClassification(), classed_data, padded),
}
METHODS = {
    "kfac": sf.InfluenceFunction(0.01, curvature="kfac"),
    "representations": sf.RepresentationSimilarity(),
    "source": sf.Source(2),
}


QUICK = ("gpt2", "llama, padded left", "bert, a class")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_factors_and_scores_do_not_depend_on_padding_or_batches(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run = trained(replace(case, collate=padded), tmp_path / "run")
    methods = dict(METHODS) if name == "gpt2" else {"kfac": METHODS["kfac"]}
    if name == "llama, padded left, each word a label":
        methods["representations"] = METHODS["representations"]
    for method in methods.values():
        alone, *others = [
            scores_of(run, replace(case, collate=collate), method, size, tmp_path / f"{method}-{number}")
            for number, (size, collate) in enumerate(
                ((1, case.collate), (4, case.collate), (3, partial(wider, collate=case.collate)))
            )
        ]
        tolerance = 1e-3 if "llama" in name else 1e-6  # its norms compute in single precision
        for values in others:
            assert (values - alone).norm() < tolerance * alone.norm()


def scores_of(run: Trained, case: Case, method: Any, batch_size: int, store: Path) -> Tensor:
    train, query = case.data()
    analyzer = sf.Analyzer(
        run.model,
        case.task,
        sf.Trajectory.load(run.folder),
        store=store,
        method=method,
        collate_fn=case.collate,
        progress=False,
    )
    analyzer.fit(train, batch_size=batch_size)
    return analyzer.score(sf.Groups.random(N, 2), train, query, batch_size=batch_size).values


def flattened(examples: Sequence[Example]) -> dict[str, Any]:
    """All examples in one row, as transformers has them without padding: positions begin anew with each."""
    from transformers import DataCollatorWithFlattening

    plain = [{key: value.tolist() for key, value in example.items() if key != "attention_mask"} for example in examples]
    return dict(DataCollatorWithFlattening(return_tensors="pt")(plain))


def gpt2_of_packed_rows() -> Any:
    """transformers keeps packed texts apart only in a model that keeps no cache."""
    model = gpt2()
    model.config.use_cache = False
    return model


def test_texts_that_are_packed_into_one_row_have_the_scores_of_padded_ones(tmp_path: Path) -> None:
    case = replace(CASES["gpt2"], make=gpt2_of_packed_rows)
    run = trained(case, tmp_path / "run")
    method = METHODS["kfac"]
    expected = scores_of(run, case, method, 3, tmp_path / "padded")
    found = scores_of(run, replace(case, collate=flattened), method, 3, tmp_path / "packed")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_model_in_which_packed_texts_see_each_other_is_refused(tmp_path: Path) -> None:
    case = replace(CASES["gpt2"], collate=flattened)
    run = trained(replace(case, collate=padded), tmp_path / "run")
    with pytest.raises(sf.TaskError, match="no row that sees another"):
        scores_of(run, case, METHODS["kfac"], 3, tmp_path / "packed")


def test_a_mean_over_each_row_is_refused_of_texts_that_are_packed_into_one(tmp_path: Path) -> None:
    case = replace(CASES["gpt2"], task=causal("sequence mean"), collate=flattened)
    run = trained(replace(case, collate=padded), tmp_path / "run")
    with pytest.raises(sf.TaskError, match="is a mean over the batch"):
        scores_of(run, case, METHODS["kfac"], 3, tmp_path / "packed")


def test_left_padding_that_no_mask_tells_is_refused(tmp_path: Path) -> None:
    """The labels of a causal model tell where padding on the right begins, and nothing of the left."""
    case = replace(CASES["llama, padded left"], collate=unmasked(Padding(side="left")))
    run = trained(replace(case, collate=padded), tmp_path / "run")
    with pytest.raises(sf.TaskError, match="no row that sees another"):
        scores_of(run, case, METHODS["kfac"], 3, tmp_path / "store")


class OwnMask(torch.nn.Module):
    """A causal model that finds padding by itself, so that its losses do not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = torch.nn.Embedding(WORDS, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids) * (input_ids != 0)[..., None]
        return self.head(torch.tanh(self.mix(h.cumsum(1))))


def test_padding_in_front_that_enters_covariances_is_refused_though_losses_are_the_same(tmp_path: Path) -> None:
    case = Case(OwnMask, causal("token sum"), prompted, unmasked(Padding(side="left")))
    run = trained(replace(case, collate=unmasked(padded)), tmp_path / "run")
    with pytest.raises(sf.TaskError, match="so that padding would enter the curvature"):
        scores_of(run, case, METHODS["kfac"], 3, tmp_path / "store")


def test_a_missing_mask_is_told_as_such(tmp_path: Path) -> None:
    case = replace(CASES["bert, masked words"], collate=unmasked(padded))
    run = trained(replace(case, collate=padded), tmp_path / "run")
    with pytest.raises(sf.TaskError, match=r"Its examples were padded \(one has \d+ positions"):
        scores_of(run, case, METHODS["kfac"], 3, tmp_path / "store")


def test_labels_on_padding_are_refused(tmp_path: Path) -> None:
    def labelled(examples: Sequence[Example]) -> dict[str, Any]:
        batch = padded(examples)
        return {**batch, "labels": batch["input_ids"]}

    case = replace(CASES["gpt2"], collate=labelled)
    run = trained(replace(case, collate=padded), tmp_path / "run")
    with pytest.raises(sf.TaskError, match=r"position \d is padding \(attention_mask 0\) and has the label 0"):
        scores_of(run, case, METHODS["kfac"], 3, tmp_path / "store")
