"""The models: freshly initialised by torch's seed."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .text import LAYER, weights


class Block(nn.Module):
    """A basic residual block (He et al. 2016) with group normalisation, which has no running statistics."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        hidden = functional.relu(self.first_norm(self.first(x)))
        out: Tensor = functional.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))
        return out


def resnet(widths: tuple[int, ...] = (16, 32, 64), blocks: int = 1, classes: int = 10) -> nn.Module:
    """A ResNet for images of 32 x 32: a stem and a stage for each width, all but the first at half the resolution."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.GroupNorm(8, widths[0]), nn.ReLU()]
    inputs = widths[0]
    for place, outputs in enumerate(widths):
        for number in range(blocks):
            layers.append(Block(inputs, outputs, 2 if place > 0 and number == 0 else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class EncoderLayer(nn.Module):
    """A post-norm layer as BERT's (Devlin et al. 2019), on hidden states that are zero where there is padding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.output_norm = nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.down_norm = nn.LayerNorm(width, eps=1e-12)

    def load(self, found: dict[str, Tensor], layer: int) -> None:
        """Take the weights of MiniLM's layer of that number."""
        names = {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "output": "attention.output.dense",
            "output_norm": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "down_norm": "output.LayerNorm",
        }
        with torch.no_grad():
            for own, other in names.items():
                for kind in ("weight", "bias"):
                    self.get_parameter(f"{own}.{kind}").copy_(found[f"encoder.layer.{layer}.{other}.{kind}"])

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """[B, S, width] -> [B, S, width]; mask [B, S] holds where there are tokens."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(states)), split(self.key(states)), split(self.value(states))
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        weights_BHSS = logits.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
        mixed = (weights_BHSS @ v).transpose(1, 2).flatten(2)
        hidden = self.output_norm(self.output(mixed) + states)
        out: Tensor = self.down_norm(self.down(functional.gelu(self.up(hidden))) + hidden)
        return out


class EncoderHead(nn.Module):
    """The last encoder layers, a pooler on the mean over the tokens and a classifier, on the states below."""

    def __init__(self, layers: int = 1, width: int = 384, heads: int = 12, classes: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, classes)

    def encode(self, states: Tensor) -> Tensor:
        """The encoder layers: [B, S, width] -> [B, S, width]."""
        mask = padding_mask(states)
        for layer in self.layers:
            states = layer(states, mask)
        return states

    def forward(self, states: Tensor) -> Tensor:
        """Logits [B, classes] of hidden states [B, S, width]."""
        mask = padding_mask(states)[..., None]
        mean = (self.encode(states) * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.classifier(torch.tanh(self.pooler(mean)))
        return logits


def pretrained_head(first: int = LAYER) -> EncoderHead:
    """MiniLM-L6's layers from `first` on with a new pooler and classifier."""
    head, found = EncoderHead(LAYER + 1 - first), weights()
    for number, layer in enumerate(head.layers, first):
        cast(EncoderLayer, layer).load(found, number)
    return head


def padding_mask(states: Tensor) -> Tensor:
    """[B, S]: whether a position holds a token."""
    return states.ne(0).any(-1)
