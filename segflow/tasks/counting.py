"""How many targets an example has on average, as a trainer that averages over a batch's tokens counts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..arguments import shown
from ..errors import TaskError
from .classification import IGNORED


def mean_tokens(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    *,
    labels: str = "labels",
    shifted: bool = True,
    ignore_index: int = IGNORED,
) -> float:
    """The mean number of labels of an example that are not ignored, for objective="batch token mean".

    transformers' Trainer divides a step's loss by the number of labels in the step's batches that are not -100; of
    causal language models it leaves out each row's first label, which nothing predicts (transformers 5; some releases
    of version 4 counted it: shifted=False). A model that averages its loss itself divides by the same count in each
    batch.

    Args:
        dataset: the training data, map-style: mappings, or pairs whose second part are labels.
        collate_fn: what makes a batch of a list with one example, where it adds the labels; what it draws at random is
            drawn here too.
        labels: the key of the labels; without it `input_ids` are counted where `attention_mask` is 1.
        shifted: whether the first label of a row does not count: True for CausalLM, False for MaskedLM and
            TokenClassification.
        ignore_index: the label of what is no target.

    Example:
        >>> mean_tokens([{"labels": [-100, 5, 7]}, {"labels": [3, 4, 5, 6]}])
        2.5
    """
    counts = [_count(dataset[i], collate_fn, labels, shifted, ignore_index) for i in range(len(dataset))]
    if not sum(counts):
        raise TaskError("mean_tokens: no example has a label that is not ignored. Give the data that was trained on.")
    return sum(counts) / len(counts)


def _count(example: Any, collate_fn: Callable[[list[Any]], Any] | None, key: str, shift: bool, ignored: int) -> int:
    """Of one example."""
    batch = example if collate_fn is None else collate_fn([example])
    labels = torch.as_tensor(_labels(batch, key, ignored))
    return int((labels[..., shift:] != ignored).sum())


def _labels(batch: Any, key: str, ignored: int) -> Any:
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[1]
    if isinstance(batch, Mapping) and key in batch:
        return batch[key]
    if isinstance(batch, Mapping) and "input_ids" in batch:
        tokens = torch.as_tensor(batch["input_ids"])
        mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(tokens)))
        return tokens.masked_fill(mask == 0, ignored)
    found = shown(list(batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise TaskError(f"mean_tokens: expected examples with {key!r}, found {found}. Name the key: labels=.")
