"""Pairs of things that belong together or not, told by the angle between their embeddings. Axes: B pairs, E features.

Source: the sigmoid loss of pairs, Zhai et al. 2023, arXiv 2303.15343.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import real_number
from ..errors import TaskError, check_choice
from .batch_task import BatchTask
from .binary import MEASUREMENTS, binary_losses, binary_measurement, check_zero_or_one
from .calling import attention_mask_of, described, entry, run, targets_if_any


class ContrastivePairs(BatchTask):
    """Binary cross-entropy of pairs, trained as the mean over them; the logit is scale * cosine + bias.

    A batch is a mapping with `first`, `second` (what the model takes, a tensor or a mapping; or flat keys such as
    "first_input_ids"), and labels: 1 for pairs that belong together, 0 for others; without labels all are 1. The model
    is run on both sides. The curvature is that of the loss in the logit.

    A loss whose negatives are the other rows of the batch (InfoNCE, CLIP, SigLIP over all pairs of a batch) is no sum
    over examples, so that no example has a loss of its own: give the pairs, negatives among them, as examples.

    Args:
        measurement: "loss", "margin" (the logit with the sign of its label), "log_probability" or "cosine".
        scale, bias: of the logit, as they were in training; they count as constants.
        embedding: what is read of a model's output: the name of an entry [B, E], as "pooler_output", or "mean" for the
            mean of `last_hidden_state` under the attention mask; None: the model returns a tensor [B, E].
        first, second, targets: the keys of a pair's two sides and of its label.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = {"first": torch.ones(4, 3), "second": torch.eye(4, 3), "labels": torch.tensor([1, 0, 0, 1])}
        >>> ContrastivePairs(scale=10, bias=-10).compute_train_loss(batch, model).shape
        torch.Size([])
    """

    def __init__(
        self,
        measurement: str = "loss",
        *,
        scale: float,
        bias: float,
        embedding: str | None = None,
        first: str = "first",
        second: str = "second",
        targets: str | None = None,
    ):
        check_choice("measurement", measurement, (*MEASUREMENTS, "cosine"), TaskError)
        super().__init__(None, targets)
        self.measurement, self.embedding, self.first, self.second = measurement, embedding, first, second
        self.scale = real_number("ContrastivePairs: scale", scale, TaskError, above=0)
        self.bias = real_number("ContrastivePairs: bias", bias, TaskError)

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The loss summed over the batch; with `sample`, of labels drawn from the model."""
        logits = self.scale * self._cosines(batch, model) + self.bias
        return binary_losses(logits, self._labels(batch, logits), drawn=sample).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The chosen measurement summed over the batch."""
        cosines = self._cosines(batch, model)
        if self.measurement == "cosine":
            return cosines.sum()
        logits = self.scale * cosines + self.bias
        return binary_measurement(self.measurement, logits, self._labels(batch, logits)).sum()

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        """The margins summed over the batch: TRAK's output function."""
        logits = self.scale * self._cosines(batch, model) + self.bias
        return binary_measurement("margin", logits, self._labels(batch, logits)).sum()

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        """[B, S + S']: the two sides' own masks, one after the other as the model is run; None where one has none."""
        masks = [attention_mask_of(self._side(batch, key)) for key in (self.first, self.second)]
        given = [mask for mask in masks if mask is not None]
        return torch.cat(given, 1) if len(given) == len(masks) else None

    def _side(self, batch: Any, key: str) -> Any:
        """What the model is given of one side: {"inputs": ...} or the entries that it may take."""
        if not isinstance(batch, Mapping):
            raise TaskError(f"ContrastivePairs: expected a mapping with {self.first!r} and {self.second!r}.")
        prefix = f"{key}_"
        flat = {k.removeprefix(prefix): v for k, v in batch.items() if isinstance(k, str) and k.startswith(prefix)}
        return flat if key not in batch and flat else {"inputs": entry(batch, key, "first=, second")}

    def _cosines(self, batch: Any, model: nn.Module) -> Tensor:
        """[B]: of the angle between the embeddings of each pair."""
        first, second = (self._embedded(self._side(batch, key), model) for key in (self.first, self.second))
        return functional.cosine_similarity(first, second, dim=-1)

    def _embedded(self, side: Mapping[str, Any], model: nn.Module) -> Tensor:
        output = run(model, side.get("inputs", side))
        if self.embedding == "mean":
            return _mean_state(output, attention_mask_of(side))
        found = output if self.embedding is None else getattr(output, self.embedding, None)
        if not isinstance(found, Tensor) or found.ndim != 2:
            shape = f" {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise TaskError(
                f"ContrastivePairs: expected embeddings [B, E], found {described(output)}{shape} with "
                f"embedding={self.embedding!r}. Name an entry of the output, as 'pooler_output', or take 'mean'."
            )
        return found

    def _labels(self, batch: Any, logits: Tensor) -> Tensor:
        labels = targets_if_any(batch, self.targets)
        if labels is None:
            return torch.ones_like(logits)
        if labels.shape != logits.shape:
            raise TaskError(
                f"ContrastivePairs: expected a label 0 or 1 of each of {len(logits)} pairs, has {tuple(labels.shape)}."
            )
        check_zero_or_one(labels, "ContrastivePairs")
        return labels.to(logits.dtype)


def _mean_state(output: Any, mask_BS: Tensor | None) -> Tensor:
    """[B, E]: the mean of the last hidden states [B, S, E] over the positions that a mask shows."""
    states = getattr(output, "last_hidden_state", output)
    if not isinstance(states, Tensor) or states.ndim != 3:
        raise TaskError(
            f"ContrastivePairs: embedding='mean' expects last_hidden_state [B, S, E], found {described(output)}. Name "
            "another entry of the output."
        )
    weights_BS = torch.ones_like(states[:, :, 0]) if mask_BS is None else mask_BS.to(states.dtype)
    return torch.einsum("bse,bs->be", states, weights_BS) / weights_BS.sum(1, keepdim=True).clamp_min(1)
