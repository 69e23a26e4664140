"""Tasks and data of the models in `models`: words, classes, sounds and images, few and small.

Axes: B examples, S positions, V classes or words, E features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import segflow as sf

Example = dict[str, Tensor]
WORDS, CLASSES = 24, 3
NO_LABEL, PADDING = -100, 0
FILL = {"labels": NO_LABEL}  # what a key is padded with, where it is not PADDING


# ---- tasks ----


class WordTask(sf.Task):
    """The mean over an example's words of their cross-entropy; shift: labels are the words that come next.

    fixed: pseudo-labels are a function of the example, so that a reference can take the same.
    """

    def __init__(self, shift: bool = False, fixed: bool = False):
        self.shift, self.fixed, self.draws_labels = shift, fixed, not fixed

    def _losses(self, batch: Example, model: nn.Module, sample: bool) -> tuple[Tensor, Tensor]:
        """Each word's cross-entropy, 0 where it has no label, and each example's weight."""
        logits, labels = logits_of(model, batch), batch["labels"]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        counts = labels != NO_LABEL
        if sample and self.fixed:
            places = torch.arange(labels.shape[1], device=labels.device)
            labels = torch.where(counts, (3 * labels + 5 * places + 1) % logits.shape[-1], NO_LABEL)
        elif sample:
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            labels = torch.where(counts, drawn, NO_LABEL)
        losses = functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=NO_LABEL)
        return losses, 1 / counts.sum(1, keepdim=True)

    def compute_train_loss(self, batch: Example, model: nn.Module, sample: bool = False) -> Tensor:
        losses, weights = self._losses(batch, model, sample)
        return ((weights.sqrt() if sample else weights) * losses).sum()

    def compute_measurement(self, batch: Example, model: nn.Module) -> Tensor:
        losses, _ = self._losses(batch, model, sample=False)
        return losses.square().sum()


class MaskedWordTask(WordTask):
    """The same, of a model that sees a mask: padding does not enter the curvature either."""

    def get_attention_mask(self, batch: Example) -> Tensor:
        return batch["attention_mask"]


class ClassTask(sf.Task):
    """Cross-entropy of an example's class; fixed as for words."""

    def __init__(self, fixed: bool = False):
        self.fixed, self.draws_labels = fixed, not fixed

    def compute_train_loss(self, batch: Example, model: nn.Module, sample: bool = False) -> Tensor:
        logits, labels = logits_of(model, batch), batch["labels"]
        if sample and self.fixed:
            first = next(iter(batch.values()))
            labels = (first.flatten(1).sum(1).abs() * 1000).long() % logits.shape[-1]
        elif sample:
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
        return functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Example, model: nn.Module) -> Tensor:
        own = logits_of(model, batch).gather(1, batch["labels"][:, None])
        return own.square().sum()


def logits_of(model: nn.Module, batch: Example) -> Tensor:
    output = model(**{name: values for name, values in batch.items() if name != "labels"})
    return output if isinstance(output, Tensor) else output.logits


# ---- data ----


def padded(examples: Sequence[Example]) -> Example:
    """A batch; what differs in length is filled up."""
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    return {
        name: pad_sequence(values, batch_first=True, padding_value=FILL.get(name, PADDING))
        if values[0].ndim
        else torch.stack(values)
        for name, values in columns.items()
    }


def bagged(examples: Sequence[Example]) -> Example:
    """A batch whose bags of `loose` words come one after the other, with the place at which each begins."""
    batch = padded([{name: value for name, value in example.items() if name != "loose"} for example in examples])
    loose = [example["loose"] for example in examples]
    starts = torch.tensor([0, *(len(bag) for bag in loose[:-1])]).cumsum(0)
    return {"words": batch["words"], "loose": torch.cat(loose), "starts": starts, "labels": batch["labels"]}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _words(lengths: Sequence[int]) -> list[Tensor]:
    """A list of words for each length; PADDING is none of them."""
    generator = _generator()
    return [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]


def causal_data(lengths: Sequence[int]) -> list[Example]:
    return [{"input_ids": w, "attention_mask": torch.ones_like(w), "labels": w} for w in _words(lengths)]


def masked_data(lengths: Sequence[int]) -> list[Example]:
    """Every third word is hidden behind word 1, and to be told."""
    examples = []
    for words in _words(lengths):
        hidden = torch.arange(len(words)) % 3 == 1
        labels = torch.where(hidden, words, NO_LABEL)
        inputs = torch.where(hidden, 1, words)
        examples.append({"input_ids": inputs, "attention_mask": torch.ones_like(words), "labels": labels})
    return examples


def classed_data(lengths: Sequence[int]) -> list[Example]:
    return [
        {"input_ids": w, "attention_mask": torch.ones_like(w), "labels": w.sum() % CLASSES} for w in _words(lengths)
    ]


def translated_data(lengths: Sequence[int]) -> list[Example]:
    """The words backwards, to be told one by one."""
    examples = []
    for words in _words(lengths):
        targets = words.flip(0)[:-1]
        shifted = torch.cat([torch.tensor([PADDING]), targets[:-1]])
        own = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        examples.append(own | {"decoder_input_ids": shifted, "labels": targets})
    return examples


def heard_data(lengths: Sequence[int]) -> list[Example]:
    """Sounds [mels, frames], and the words in them."""
    generator = _generator()
    examples = []
    for words in _words(lengths):
        sound = torch.randn(4, 12, generator=generator, dtype=torch.float64)
        shifted = torch.cat([torch.tensor([PADDING]), words[:-1]])
        examples.append({"input_features": sound, "decoder_input_ids": shifted, "labels": words})
    return examples


def image_data(lengths: Sequence[int]) -> list[Example]:
    generator = _generator()
    images = torch.randn(len(lengths), 2, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (len(lengths),), generator=generator)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def word_data(lengths: Sequence[int]) -> list[Example]:
    return [{"words": w, "labels": w.sum() % CLASSES} for w in _words(lengths)]


def bag_data(lengths: Sequence[int]) -> list[Example]:
    return [{"words": w, "loose": w.flip(0)[1:], "labels": w.sum() % CLASSES} for w in _words(lengths)]
