"""Tasks as Kronfluence's examples have them, in other words: the same methods, losses, pseudo-labels and measurements.

They derive from Kronfluence's own Task, know nothing of segflow, and follow its examples on UCI regression, CIFAR,
GLUE, WikiText and SWAG. Axes: B examples, S positions, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from kronfluence.task import Task
from torch import Tensor, nn
from torch.nn import functional


def _drawn(logits: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.multinomial(logits.softmax(-1), num_samples=1).flatten()


def _cross_entropy(logits: Tensor, labels: Tensor, sample: bool) -> Tensor:
    return functional.cross_entropy(logits, _drawn(logits) if sample else labels, reduction="sum")


def _negative_margins(logits: Tensor, labels: Tensor) -> Tensor:
    rows = torch.arange(len(logits), device=logits.device)
    others = logits.clone()
    others[rows, labels] = -torch.inf
    return -(logits[rows, labels] - others.logsumexp(-1)).sum()


class UciRegression(Task):
    """A squared error; pseudo-targets are normal with variance 1/2."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, targets = batch
        outputs = model(inputs)
        if sample:
            with torch.no_grad():
                targets = torch.normal(outputs.detach(), std=0.5**0.5)
        return functional.mse_loss(outputs, targets, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


class CifarClassification(Task):
    """Cross-entropy, measured by margins."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        return _cross_entropy(model(inputs), labels, sample)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        inputs, labels = batch
        return _negative_margins(model(inputs), labels)


class GlueClassification(Task):
    """Sequences, padded, to classes."""

    keys: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")

    def logits(self, batch: Any, model: nn.Module) -> Tensor:
        logits: Tensor = model(**{key: batch[key] for key in self.keys}).logits
        return logits

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return _cross_entropy(self.logits(batch, model), batch["labels"], sample)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return _negative_margins(self.logits(batch, model), batch["labels"])

    def get_attention_mask(self, batch: Any) -> Tensor:
        mask: Tensor = batch["attention_mask"]
        return mask


class WikiTextLanguageModel(Task):
    """Next tokens of blocks of text, summed over tokens; of all modules those in the blocks are attributed."""

    def __init__(self, blocks: int):
        self.blocks = blocks

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits_TV = logits[:, :-1].reshape(-1, logits.shape[-1])
        return _cross_entropy(logits_TV, batch["labels"][:, 1:].reshape(-1), sample)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        places = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        return [f"transformer.h.{block}.{place}" for block in range(self.blocks) for place in places]

    def get_attention_mask(self, batch: Any) -> Tensor:
        mask: Tensor = batch["attention_mask"]
        return mask


class SwagMultipleChoice(GlueClassification):
    """Four endings of an example are four rows of the model, whose gradients Kronfluence is told to add up."""

    enable_post_process_per_sample_gradient = True
    keys = ("input_ids", "attention_mask")

    def get_attention_mask(self, batch: Any) -> Tensor:
        mask: Tensor = batch["attention_mask"]
        return mask.reshape(-1, mask.shape[-1])

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        return gradient.reshape(len(gradient) // 4, 4, *gradient.shape[1:]).sum(1)
