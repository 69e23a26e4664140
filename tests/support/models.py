"""Whole models as their users have them: each small, in float64, with data, a task, and a short run that was recorded.

The transformers' models are made from configurations, the others here. `CASES` names them all. Axes: B examples,
S positions, V classes or words, E features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import segflow as sf

Example = dict[str, Tensor]
N, QUERIES, WORDS, CLASSES = 7, 3, 24, 3
NO_LABEL, PADDING = -100, 0
FILL = {"labels": NO_LABEL}  # what a key is padded with, where it is not PADDING
LENGTHS = (5, 7, 4, 7, 6, 3, 7, 6, 7, 4)  # of N training examples and QUERIES queries


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


# ---- models ----


class LSTMClassifier(nn.Module):
    """Words to a class, by the state after the last word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8, padding_idx=PADDING)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        states_BSE, _ = self.lstm(self.embedding(words))
        last_B = (words != PADDING).sum(1) - 1
        return self.head(states_BSE[torch.arange(len(words)), last_B])


class EncoderClassifier(nn.Module):
    """torch's own transformer, with a class token and positions that are bare parameters."""

    def __init__(self, batch_first: bool, most: int = 7) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(WORDS, 8)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8) / 4)
        self.positions = nn.Parameter(torch.randn(1, most + 1, 8) / 4)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        first = self.class_token.expand(len(words), -1, -1)
        x_BSE = torch.cat([first, self.embedding(words)], 1)
        x_BSE = x_BSE + self.positions[:, : x_BSE.shape[1]]
        ignored_BS = functional.pad(words == PADDING, (1, 0))
        if self.batch_first:
            return self.head(self.encoder(x_BSE, src_key_padding_mask=ignored_BS)[:, 0])
        return self.head(self.encoder(x_BSE.transpose(0, 1), src_key_padding_mask=ignored_BS)[0])


class BagNet(nn.Module):
    """Bags of words, padded and one after the other, through transposed convolutions and batch norms to a class."""

    def __init__(self) -> None:
        super().__init__()
        self.summed = nn.EmbeddingBag(WORDS, 8, mode="sum", padding_idx=PADDING)
        self.averaged = nn.EmbeddingBag(WORDS, 8, mode="mean")
        self.line = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2)
        self.line_norm = nn.BatchNorm1d(6)
        self.plane = nn.ConvTranspose2d(2, 4, (2, 3), stride=(1, 2))
        self.plane_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, words: Tensor, loose: Tensor, starts: Tensor) -> Tensor:
        x_BE = torch.cat([self.summed(words), self.averaged(loose, starts)], 1)
        line = torch.relu(self.line_norm(self.line(x_BE.unflatten(1, (4, 4)))))
        plane = torch.tanh(self.plane_norm(self.plane(line.reshape(len(line), 2, 3, 7))))
        return self.head(plane.mean((2, 3)))


class Residual(nn.Module):
    """Two convolutions beside the identity, or beside a convolution that halves the image."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        down = (nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.downsample = nn.Sequential(*down) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.downsample(x))


class ResNet(nn.Module):
    """As torchvision's, of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layers = nn.Sequential(Residual(4, 4, 1), Residual(4, 6, 2))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.fc(self.layers(torch.relu(self.bn1(self.conv1(pixel_values)))).mean((2, 3)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": WORDS, "n_positions": 10, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def _bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=10,
        num_labels=CLASSES,
    )


def masked_bert() -> nn.Module:
    from transformers import BertForMaskedLM

    return BertForMaskedLM(_bert_config())


def bert_classifier() -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config())


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=10,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_channels=2,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=WORDS,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        decoder_start_token_id=PADDING,
    )
    return T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_source_positions=6,
        max_target_positions=10,
        pad_token_id=PADDING,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=PADDING,
    )
    return WhisperForConditionalGeneration(config)


def transformers_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=2,
        embedding_size=4,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="bottleneck",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config)


# ---- cases, and their runs ----


@dataclass(frozen=True)
class Case:
    """A model, what it is trained on, and how examples are joined."""

    make: Callable[[], nn.Module]
    task: sf.Task
    make_data: Callable[[Sequence[int]], list[Example]]
    collate: Callable[[Sequence[Example]], Example] = padded
    lengths: tuple[int, ...] = LENGTHS

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double()

    def data(self) -> tuple[list[Example], list[Example]]:
        """Training examples and queries."""
        examples = self.make_data(self.lengths)
        return examples[:N], examples[N:]


CASES = {
    "gpt2": Case(gpt2, WordTask(shift=True), causal_data),
    "masked bert": Case(masked_bert, MaskedWordTask(), masked_data),
    "bert classifier": Case(bert_classifier, ClassTask(), classed_data),
    "llama": Case(llama, WordTask(shift=True), causal_data),
    "vit": Case(vit, ClassTask(), image_data),
    "t5": Case(t5, WordTask(), translated_data),
    "whisper": Case(whisper, WordTask(), heard_data),
    "resnet": Case(ResNet, ClassTask(), image_data),
    "transformers' resnet": Case(transformers_resnet, ClassTask(), image_data),
    "lstm": Case(LSTMClassifier, ClassTask(), word_data),
    "encoder": Case(lambda: EncoderClassifier(batch_first=True), ClassTask(), word_data),
    "encoder, batch second": Case(lambda: EncoderClassifier(batch_first=False), ClassTask(), word_data),
    "bags": Case(BagNet, ClassTask(), bag_data, bagged),
}


def is_plain(name: str, parameter: nn.Parameter) -> bool:
    """Whether the common recipe leaves a parameter without weight decay: biases and norms."""
    return parameter.ndim < 2 or name.endswith("bias")


def adamw(model: nn.Module, lr: float = 3e-3, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW as everyone has it."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if not is_plain(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if is_plain(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


@dataclass(frozen=True)
class Trained:
    """A recorded run: the model at its end, and the parameters that it changed."""

    case: Case
    model: nn.Module
    folder: Path
    changed: dict[str, nn.Parameter]


def trained(case: Case, folder: Path, epochs: int = 2, batch_size: int = 4) -> Trained:
    """Train the case's model for a few steps inside `record`."""
    model, (data, _) = case.model(), case.data()
    before, optimizer = copy.deepcopy(model.state_dict()), adamw(model)
    batches = [data[start : start + batch_size] for start in range(0, N, batch_size)]
    steps = epochs * len(batches)
    with sf.record(model, optimizer, folder, dataset_size=N, total_steps=steps, checkpoints=2, progress=False):
        for _ in range(epochs):
            for examples in batches:
                optimizer.zero_grad()
                (case.task.compute_train_loss(case.collate(examples), model) / len(examples)).backward()
                optimizer.step()
    model.eval()
    changed = {name: p for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return Trained(case, model, folder, changed)
