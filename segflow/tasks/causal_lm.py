"""Language models that say what comes next. Axes: B examples, S positions, C words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import TaskError
from .calling import attention_mask_of, mapping_in, targets_if_any, targets_of
from .classification import cross_entropies
from .task import FaultyRowError
from .tokens import Targets, TokenTask

CONTRAST = "contrast_"  # what the keys of a query's second completion begin with


class CausalLM(TokenTask):
    """Cross-entropy of the next token: logits [B, S, C], and labels [B, S] that are the tokens themselves.

    Labels are those of transformers: position s is asked for the label at s + 1. Where a batch has none, they are its
    `input_ids` where `attention_mask` is 1. Padding is asked for nothing, so that the first token of a row that is
    padded on the left is no target, though transformers' own loss counts it. Pseudo-labels are drawn for targets alone.
    The weight of a target is 1/T ("sequence mean", of a sequence with T targets), 1 ("token sum") or 1/mean_tokens
    ("batch token mean").

    The model's own loss is not used: what it adds to the cross-entropy, as the balancing loss of a mixture of experts
    (`aux_loss`), is not attributed.

    Args:
        objective: how the training loss joined tokens: "sequence mean" (the mean over each sequence's targets), "token
            sum" (their sum), or "batch token mean" (all targets of a batch are averaged together, as transformers'
            Trainer does).
        mean_tokens: how many targets an example has on average in the trainer's count, which "batch token mean" needs:
            `segflow.tasks.mean_tokens(train)`.
        measurement: "loss" (in the objective's weight), "log_probability" (of all targets, summed: of a completion,
            where the prompt's labels are ignored), or "contrast" (the log-probability of the batch's labels less that
            of another completion, which stands under the same keys with "contrast_" before them).
        weights, mean_weight: the key of the examples' weights, by which all of an example's targets are multiplied, and
            what the loss was divided by besides; as for `Classification`.
        label_smoothing: as for `Classification`, and as the Trainer's `label_smoothing_factor`.
        ignore_index: the label of what is no target.
        labels: the key of the labels; inputs: as for `Classification`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> batch = {"input": torch.tensor([[1, 4, 2]]), "labels": torch.tensor([[1, 4, 2]])}
        >>> CausalLM("batch token mean", mean_tokens=2).compute_train_loss(batch, model).shape
        torch.Size([])
    """

    shifts = True
    measurements = ("loss", "log_probability", "contrast")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The chosen measurement summed over the batch."""
        if self.measurement == "contrast":
            return self._log_probability(batch, model) - self._log_probability(_second_completion(batch), model)
        return super().compute_measurement(batch, model)

    def _log_probability(self, batch: Any, model: nn.Module) -> Tensor:
        """Of all targets, summed."""
        logits, labels, _, _ = self._targets(batch, model)
        return -cross_entropies(logits, labels).sum()

    def _targets(self, batch: Any, model: nn.Module) -> Targets:
        """Those of the batch's own completions."""
        return super()._targets(_own_part(batch), model)

    def _labels(self, batch: Any) -> Tensor:
        """What each position is asked for; nothing at padding, which would be asked for the first token of a row."""
        labels_BS, mask_BS = super()._labels(batch), attention_mask_of(batch)
        if mask_BS is None or mask_BS.shape != labels_BS.shape:
            return labels_BS
        return labels_BS.masked_fill(mask_BS == 0, self.ignore_index)

    def _check_padding(self, given_BS: Any, mask_BS: Tensor | None) -> None:
        """Raise TaskError where padding has labels, for a trainer's loss counts them; looked at on the CPU only."""
        if mask_BS is None or mask_BS.device.type != "cpu":
            return
        if not isinstance(given_BS, Tensor) or given_BS.shape != mask_BS.shape:
            return
        if bool((odd_BS := (given_BS != self.ignore_index) & (mask_BS == 0)).any()):
            row, place = (int(number) for number in odd_BS.nonzero()[0])
            raise FaultyRowError(
                row,
                f"{self.__class__.__name__}: position {place} is padding (attention_mask 0) and has the label "
                f"{int(given_BS[row, place])}, which transformers' loss counts if it is not {self.ignore_index}. Give "
                f"the labels that were trained on; if padding was counted, leave the attention_mask out.",
            )

    def _given_labels(self, batch: Any) -> Any:
        """The batch's labels, or its tokens where there are none."""
        mapping, key = mapping_in(batch), self.targets
        if isinstance(batch, Mapping) and key is None:  # a "label" beside tokens is a class
            key = next((name for name in ("labels", "targets") if name in batch), None)
        tokens_alone = isinstance(batch, Mapping) and key is None and "input_ids" in batch
        labels_BS, mask_BS = None if tokens_alone else targets_if_any(batch, key), attention_mask_of(batch)
        if labels_BS is not None:
            self._check_padding(labels_BS, mask_BS)
            return labels_BS
        if mapping is None or not isinstance(tokens_BS := mapping.get("input_ids"), Tensor):
            return targets_of(batch, self.targets)
        return tokens_BS if mask_BS is None else tokens_BS.masked_fill(mask_BS == 0, self.ignore_index)

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        """[B, S]: 0 at padding, and after the last position that a target sees, for nothing depends on these.

        Without an attention mask in the batch None where there is nothing after it.
        """
        counts = self._labels(batch) != self.ignore_index
        seen = counts.flip(1).cumsum(1).flip(1) > 0
        given = attention_mask_of(batch)
        if given is None and seen.device.type == "cpu" and bool(seen.all()):
            return None  # what stands in front of a target may be padding, or a prompt: labels do not tell
        return seen.long() if given is None or given.shape != seen.shape else seen * given.long()


def _own_part(batch: Any) -> Any:
    """A batch without second completions."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if not str(key).startswith(CONTRAST)}
    return batch


def _second_completion(batch: Any) -> dict[str, Any]:
    """What stands under keys that begin with CONTRAST, without it; TaskError where nothing does."""
    keys = [key for key in batch if str(key).startswith(CONTRAST)] if isinstance(batch, Mapping) else []
    if not keys:
        raise TaskError(
            "CausalLM: measurement='contrast' without a second completion. Give it in the queries under "
            "'contrast_input_ids', 'contrast_attention_mask' and 'contrast_labels', as segflow.tasks.Completions(..., "
            "contrast=) does."
        )
    return {key.removeprefix(CONTRAST): batch[key] for key in keys}
