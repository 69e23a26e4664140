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

import segflow as sf

from .model_tasks import (
    CLASSES,
    PADDING,
    WORDS,
    ClassTask,
    Example,
    MaskedWordTask,
    WordTask,
    bag_data,
    bagged,
    causal_data,
    classed_data,
    heard_data,
    image_data,
    masked_data,
    padded,
    translated_data,
    word_data,
)

N, QUERIES = 7, 3
LENGTHS = (5, 7, 4, 7, 6, 3, 7, 6, 7, 4)  # of N training examples and QUERIES queries


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


def gpt2(tied: bool = True) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": WORDS, "n_positions": 10, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, tie_word_embeddings=tied))


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
