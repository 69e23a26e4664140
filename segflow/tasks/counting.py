"""How many targets an example has on average, as a trainer that averages over a batch's tokens counts them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..errors import TaskError
from .calling import unwrapped
from .classification import IGNORED


def mean_tokens(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    *,
    labels: str = "labels",
    shifted: bool | None = None,
    model: nn.Module | None = None,
    ignore_index: int = IGNORED,
) -> float:
    """The mean number of labels of an example that are not ignored, for objective="batch token mean".

    transformers' Trainer divides a step's loss by the number of labels in the step's batches that are not -100. Of
    models whose class is called ...ForCausalLM its later versions leave out each row's first label, which nothing
    predicts; of others, as GPT2LMHeadModel, they count it (read in version 5.24). Give `model=`, or say it by
    `shifted=`. Neither is needed where first labels are ignored anyway.

    Args:
        dataset: the training data, map-style: mappings, or pairs whose second part are labels.
        collate_fn: what makes a batch of a list with one example, where it adds the labels; what it draws at random is
            drawn here too.
        labels: the key of the labels; without it `input_ids` are counted where `attention_mask` is 1.
        shifted: whether the first label of a row does not count: False for MaskedLM and TokenClassification.
        model: the model that the Trainer had, by which it decided.
        ignore_index: the label of what is no target.

    Example:
        >>> mean_tokens([{"labels": [-100, 5, 7]}, {"labels": [3, 4, 5, 6]}], shifted=True)
        2.5
    """
    _check_dataset(dataset)
    rows = (_labels(dataset[i], collate_fn, labels, ignore_index) != ignore_index for i in range(len(dataset)))
    counts = [(int(counted.sum()), int(counted[..., 1:].sum())) for counted in rows]
    every, later = (sum(side) for side in zip(*(counts or [(0, 0)]), strict=True))
    if model is not None and shifted is None:
        shifted = trainer_shifts(model)
    if shifted is None and every != later:
        raise TaskError(
            f"mean_tokens: {every - later} of {len(counts)} examples begin with a label that is not ignored. Say if "
            "the trainer counted these: model= (the Trainer's, by which it decides), shifted=True for CausalLM where "
            "it did not, or shifted=False, as for MaskedLM and TokenClassification."
        )
    total = later if shifted else every
    if not total:
        raise TaskError("mean_tokens: no example has a label that is not ignored. Give the data that was trained on.")
    return total / len(counts)


def _check_dataset(dataset: Any) -> None:
    if hasattr(dataset, "__getitem__") and not (isinstance(dataset, Mapping) and 0 not in dataset):
        return
    keys = f" with the keys {shown(list(dataset))}" if isinstance(dataset, Mapping) else ""
    raise TaskError(
        f"mean_tokens: found a {type(dataset).__name__}{keys}, expected a dataset whose examples are numbered from 0. "
        "Of a DataLoader give its .dataset, with collate_fn=loader.collate_fn; of several splits the one trained on."
    )


def trainer_shifts(model: nn.Module) -> bool:
    """Whether transformers' Trainer leaves each row's first label out when it counts a batch's labels.

    So it does in versions that know the loss of causal models, where the model's class says that it has this one.
    """
    losses, trainer = (sys.modules.get(f"transformers.{name}") for name in ("loss.loss_utils", "trainer"))
    base = unwrapped(model)
    loss = getattr(losses, "LOSS_MAPPING", {}).get(getattr(base, "loss_type", None))
    is_causal = loss is not None and loss is getattr(losses, "ForCausalLMLoss", None)
    made = None if trainer is None else inspect.unwrap(trainer.Trainer.__init__).__code__
    knows = made is None or "_loss_shifts_labels" in made.co_names
    return is_causal and knows and not getattr(getattr(base, "config", None), "is_encoder_decoder", False)


def _labels(example: Any, collate_fn: Callable[[list[Any]], Any] | None, key: str, ignored: int) -> Tensor:
    """The labels of an example, or of the batch that it makes."""
    batch = example if collate_fn is None else collate_fn([example])
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return torch.as_tensor(batch[1])
    if isinstance(batch, Mapping) and key in batch:
        return torch.as_tensor(batch[key])
    if isinstance(batch, Mapping) and "input_ids" in batch:
        tokens = torch.as_tensor(batch["input_ids"])
        mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(tokens)))
        return tokens.masked_fill(mask == 0, ignored)
    found = shown(list(batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise TaskError(f"mean_tokens: expected examples with {key!r}, found {found}. Name the key: labels=.")
