"""SOURCE of whole models under AdamW in dense matrices, each trained parameter in the block that it belongs to.

A naive implementation: each example runs alone, blocks' covariances are sums over its tokens, eigenvectors are those of
dense matrices, and the functions of the curvature are matrices [D, D]. Nothing here imports segflow. Layers are
coupled, and the query gradient is the mean along the run (SOURCE's defaults).

Letters as in `oracles`; V words of an embedding, n examples, C checkpoints, G parameter groups of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import oracles

Named = Mapping[str, Tensor]  # of parameters
Calls = Mapping[str, list[tuple[Tensor, Tensor]]]  # of modules: the input of each call, and the gradient of its output
BETA1, EPS = 0.9, 1e-8  # torch.optim.AdamW's defaults


@dataclass(frozen=True)
class Run:
    """What a training run left: states and bias-corrected second moments [C], learning rates and weight decays [T, G].

    groups: of each parameter, by its first name in the model.
    """

    steps: tuple[int, ...]
    states: list[dict[str, Tensor]]
    moments: list[dict[str, Tensor]]
    learning_rates: Tensor
    weight_decays: Tensor
    groups: dict[str, int]

    @property
    def rates(self) -> Tensor:
        """[T, G]: what each step's gradient moves the parameters by, in units of P * gradient, in its and later steps.

        Step j moves by lr_j m_j / (1 - beta1^j), and m_j has (1 - beta1) beta1^(j - k) of gradient k.
        """
        rates = torch.zeros_like(self.learning_rates)
        for k in range(len(rates)):
            for j in range(k, len(rates)):
                rates[k] += self.learning_rates[j] * (1 - BETA1) * BETA1 ** (j - k) / (1 - BETA1 ** (j + 1))
        return rates

    @property
    def decays(self) -> Tensor:
        """[T, G]: what each step takes away of the parameters themselves."""
        return self.learning_rates * self.weight_decays

    def covered(self, checkpoints: Sequence[int], start: int, end: int) -> Tensor:
        """[C, G]: the rates of the steps in (start, end] that are nearest to each checkpoint."""
        steps = [self.steps[index] for index in checkpoints]
        bounds = [start, *((a + b) // 2 for a, b in pairwise(steps)), end]
        return torch.stack([self.rates[low:high].sum(0) for low, high in pairwise(bounds)])


# ---- blocks ----


@dataclass(frozen=True)
class Block:
    """A vector block, of a tensor that no layer takes as its weight or folds in: [1, D, 1]."""

    name: str
    group: int
    parameters: tuple[str, ...]
    modules: tuple[tuple[str, nn.Module], ...] = ()

    exact_inside = True  # whether P inside the curvature is exact, or its rank-one part
    dense_inputs = True

    def matrix(self, of: Named) -> Tensor:
        """[P, O, I] from what is shaped as the parameters."""
        return of[self.parameters[0]].reshape(1, -1, 1)

    def tokens(self, _calls: Calls, gradients: Named) -> tuple[Tensor, Tensor]:
        """One example's a [T, P, I] and g [T, P, O], whose products add up to the example's gradient."""
        return torch.ones(1, 1, 1, dtype=torch.float64), gradients[self.parameters[0]].reshape(1, 1, -1)


class Layer(Block):
    """A Linear, a Conv or a transformers' Conv1D; its bias is the last input where it has the weight's group."""

    exact_inside = False

    def matrix(self, of: Named) -> Tensor:
        [(_, module)], weight = self.modules, of[self.parameters[0]]
        parts, weight = getattr(module, "groups", 1), weight.mT if is_transposed(module) else weight
        matrix = weight.reshape(parts, weight.shape[0] // parts, -1)
        biases = [of[bias].reshape(parts, -1, 1) for bias in self.parameters[1:]]
        return torch.cat([matrix, *biases], 2)

    def tokens(self, calls: Calls, _gradients: Named) -> tuple[Tensor, Tensor]:
        [(name, module)] = self.modules
        pairs = [_layer_tokens(module, x, g) for x, g in calls[name]]
        a, g = (torch.cat(side) for side in zip(*pairs, strict=True))
        return (F.pad(a, (0, 1), value=1.0) if len(self.parameters) > 1 else a), g


class Embedded(Block):
    """An embedding [1, O = its width, I = V]: inputs are one-hot, and in their own axes."""

    dense_inputs = False

    def matrix(self, of: Named) -> Tensor:
        return of[self.parameters[0]].mT[None]

    def tokens(self, calls: Calls, _gradients: Named) -> tuple[Tensor, Tensor]:
        [(name, module)] = self.modules
        pairs = [_word_tokens(module, x, g) for x, g in calls[name]]
        one_hot, g = (torch.cat(side) for side in zip(*pairs, strict=True))
        return one_hot[:, None], g[:, None]


class Tied(Block):
    """A head whose weight is an embedding's: [1, O = V, I = width]; a word that is embedded is a token as well.

    Of that, a is the gradient of the embedding's output, and g is one-hot.
    """

    exact_inside = False  # the exact P would take gradients out of the span of S, where eigenvectors are arbitrary

    def matrix(self, of: Named) -> Tensor:
        return of[self.parameters[0]][None]

    def tokens(self, calls: Calls, _gradients: Named) -> tuple[Tensor, Tensor]:
        a_TI, g_TO = [], []
        for name, module in self.modules:
            for x, gradient in calls[name]:
                if isinstance(module, nn.Embedding):
                    one_hot, slopes = _word_tokens(module, x, gradient)
                    a_TI, g_TO = [*a_TI, slopes], [*g_TO, one_hot]
                else:
                    a_TI, g_TO = [*a_TI, x.flatten(0, -2)], [*g_TO, gradient.flatten(0, -2)]
        return torch.cat(a_TI)[:, None], torch.cat(g_TO)[:, None]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a transformers' Conv1D, y = x W + b."""
    return type(module).__name__ == "Conv1D"


def _layer_tokens(module: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, oracles.ConvNd):
        return oracles.conv_tokens(module, x, gradient)
    return x.reshape(-1, 1, x.shape[-1]), gradient.reshape(-1, 1, gradient.shape[-1])


def _word_tokens(module: nn.Module, words: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """One-hot [T, V], and the gradients [T, width] of the embedding's output; none of padding, which is not trained."""
    words, gradient = words.flatten(), gradient.reshape(-1, gradient.shape[-1])
    counts = words != (-1 if module.padding_idx is None else module.padding_idx)
    return F.one_hot(words[counts], module.num_embeddings).double(), gradient[counts]


def blocks_of(model: nn.Module, groups: Mapping[str, int]) -> list[Block]:
    """The block of each parameter that is in a parameter group."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) or is_transposed(module):
            uses.setdefault(first[id(module.weight)], []).append((name, module))
    blocks: list[Block] = []
    for weight, modules in uses.items():
        bias = getattr(modules[0][1], "bias", None)
        folded = bias is not None and len(modules) == 1 and groups[first[id(bias)]] == groups[weight]
        kind = Tied if len(modules) > 1 else Embedded if isinstance(modules[0][1], nn.Embedding) else Layer
        named = (weight, first[id(bias)]) if folded else (weight,)
        blocks.append(kind(modules[-1][0], groups[weight], named, tuple(modules)))
    taken = {name for block in blocks for name in block.parameters}
    return [*blocks, *(Block(name, group, (name,)) for name, group in groups.items() if name not in taken)]


# ---- what the formulas need, one example after the other ----


class Examples(NamedTuple):
    """Of each block: the gradients [n, P, O, I] of n examples, and the means A, S of their tokens' products."""

    gradients: dict[str, Tensor]
    A: dict[str, Tensor]
    S: dict[str, Tensor]


def examples_at(model: nn.Module, blocks: Iterable[Block], losses: Iterable[Callable[[], Tensor]]) -> Examples:
    """Gradients and covariances of examples, given the loss of each one alone."""
    modules = {name: module for block in blocks for name, module in block.modules}
    parameters = {name: model.get_parameter(name) for block in blocks for name in block.parameters}
    gradients: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    tokens: dict[str, list[tuple[Tensor, Tensor]]] = {block.name: [] for block in blocks}
    for loss_of in losses:
        with oracles.recorded_calls(modules) as recorded:
            loss = loss_of()
        wanted = [*parameters.values(), *(output for _, _, output in recorded)]
        slopes = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        of_parameters = dict(zip(parameters, slopes[: len(parameters)], strict=True))
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for (name, x, _), slope in zip(recorded, slopes[len(parameters) :], strict=True):
            calls.setdefault(name, []).append((x, slope))
        for block in blocks:
            gradients[block.name].append(block.matrix(of_parameters))
            tokens[block.name].append(block.tokens(calls, of_parameters))
            _assert_whole(block, gradients[block.name][-1], *tokens[block.name][-1])
    joined = {name: tuple(torch.cat(side) for side in zip(*pairs, strict=True)) for name, pairs in tokens.items()}
    A, S = ({name: _second_moment(sides[place]) for name, sides in joined.items()} for place in (0, 1))
    return Examples({name: torch.stack(rows) for name, rows in gradients.items()}, A, S)


def _second_moment(rows_TPD: Tensor) -> Tensor:
    return torch.einsum("tpi,tpj->pij", rows_TPD, rows_TPD) / len(rows_TPD)


def _assert_whole(block: Block, gradient: Tensor, a_TPI: Tensor, g_TPO: Tensor) -> None:
    """The reference's own tokens make up autograd's gradient."""
    made = torch.einsum("tpo,tpi->poi", g_TPO, a_TPI)
    assert (made - gradient).abs().max() <= 1e-12 * (1 + gradient.abs().max()), block.name


# ---- SOURCE ----


class Stretch(NamedTuple):
    """A segment: its checkpoints, and of each parameter group its summed rates, its decays, and the weights [C, G]."""

    checkpoints: tuple[int, ...]
    rates: Tensor
    decays: Tensor
    weights: Tensor


def stretches(run: Run, count: int) -> list[Stretch]:
    """The run in so many segments of as many checkpoints each."""
    size = len(run.steps) // count
    found = []
    for place in range(count):
        inside = tuple(range(place * size, (place + 1) * size))
        start, end = (0 if not place else run.steps[inside[0] - 1]), run.steps[inside[-1]]
        amounts = run.covered(inside, start, end)
        sums = (run.rates[start:end].sum(0), run.decays[start:end].sum(0))
        found.append(Stretch(inside, *sums, amounts / amounts.sum(0)))
    return found


class Spectrum(NamedTuple):
    """Of a block in a segment: P [P, O, I], eigenvalues [P, D] and eigenvectors [P, D, D] of P^1/2 F P^1/2."""

    P: Tensor
    sigma: Tensor
    U: Tensor


def spectrum(block: Block, run: Run, stretch: Stretch, sampled: Sequence[Examples]) -> Spectrum:
    """A block's curvature in a segment, of the pseudo-gradients at each of its checkpoints."""
    weights = stretch.weights[:, block.group].tolist()
    P, p_O, p_I = preconditioner([block.matrix(run.moments[index]) for index in stretch.checkpoints], weights)
    own = [sampled[index] for index in stretch.checkpoints]
    A = sum(w * at.A[block.name] for w, at in zip(weights, own, strict=True))
    S = sum(w * at.S[block.name] for w, at in zip(weights, own, strict=True))
    root_O, root_I = p_O.sqrt(), p_I.sqrt()
    Q_S = torch.linalg.eigh(root_O[:, :, None] * S * root_O[:, None, :]).eigenvectors
    Q_A = torch.linalg.eigh(root_I[:, :, None] * A * root_I[:, None, :]).eigenvectors
    Q_A = Q_A if block.dense_inputs else torch.eye(A.shape[-1], dtype=A.dtype)[None]
    root = P.sqrt() if block.exact_inside else root_O[:, :, None] * root_I[:, None, :]
    Lambda = sum(
        w * (Q_S.mT @ (root * at.gradients[block.name]) @ Q_A).square().mean(0)
        for w, at in zip(weights, own, strict=True)
    )
    U = torch.stack([torch.kron(*part) for part in zip(Q_S.contiguous(), Q_A.contiguous(), strict=True)])
    return Spectrum(P, Lambda.flatten(1), U)


def preconditioner(moments: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """P [P, O, I] and its rank-one part p_O [P, O], p_I [P, I]; where there never was a gradient P is that part."""
    P = oracles.preconditioner(moments, EPS, weights)
    live = torch.stack(list(moments)).sum(0) > 0
    logs, p_O, p_I = torch.where(live, P, 1.0).log(), torch.zeros_like(P[:, :, 0]), torch.zeros_like(P[:, 0, :])
    for _ in range(200):  # least squares of the logarithm, over the entries that are live
        p_O = ((logs - p_I[:, None, :]) * live).sum(2) / live.sum(2).clamp_min(1)
        p_I = ((logs - p_O[:, :, None]) * live).sum(1) / live.sum(1).clamp_min(1)
    p_O, p_I = p_O.exp(), p_I.exp()
    return torch.where(live, P, p_O[:, :, None] * p_I[:, None, :]), p_O, p_I


@dataclass(frozen=True)
class Seen:
    """A run's data at each checkpoint: real and pseudo-gradients of the training examples, gradients of the queries."""

    real: list[Examples]
    sampled: list[Examples]
    asked: list[Examples]


def source_scores(
    run: Run, blocks: Sequence[Block], seen: Seen, members: Sequence[Sequence[int]], segments: int
) -> Tensor:
    """[Q, K]: SOURCE's scores (Bae et al. 2024, Eqs. 13-22) of groups with these members."""
    along = run.covered(range(len(run.steps)), 0, run.steps[-1]).sum(1)
    along = along / along.sum()
    n, total = len(next(iter(seen.real[0].gradients.values()))), torch.zeros((), dtype=torch.float64)
    walked = {
        block.name: sum(w * at.gradients[block.name] for w, at in zip(along, seen.asked, strict=True))
        for block in blocks
    }
    for stretch in reversed(stretches(run, segments)):
        spectra = {block.name: spectrum(block, run, stretch, seen.sampled) for block in blocks}
        amounts = {b.name: stretch.rates[b.group].item() * spectra[b.name].sigma.sum().item() for b in blocks}
        for block in blocks:
            share = amounts[block.name] / sum(amounts.values())
            options = (stretch.rates[block.group].item(), stretch.decays[block.group].item())
            of, v = spectra[block.name], walked[block.name]
            learned = _applied(of, oracles.response(*options)(of.sigma / share), v, 0.5)
            walked[block.name] = _applied(of, oracles.decay(*options)(of.sigma / share), v, -0.5)
            weights = stretch.weights[:, block.group]
            for weight, index in zip(weights, stretch.checkpoints, strict=True):
                rows = seen.real[index].gradients[block.name]
                grouped = torch.stack([rows[list(group)].sum(0) for group in members])
                total = total + weight * learned.flatten(1) @ grouped.flatten(1).mT / n
    return total


def _applied(of: Spectrum, f: Tensor, v_QPOI: Tensor, power: float) -> Tensor:
    """P^power U f U^T P^1/2 v."""
    dense_PDD = of.U @ torch.diag_embed(f) @ of.U.mT
    rows_QPD = (of.P.sqrt() * v_QPOI).flatten(2)
    return of.P**power * torch.einsum("pij,qpj->qpi", dense_PDD, rows_QPD).reshape(v_QPOI.shape)


def seen_by(
    model: nn.Module,
    run: Run,
    blocks: Sequence[Block],
    losses: Mapping[str, Sequence[Callable[[], Tensor]]],
) -> Seen:
    """The run's data at its checkpoints; losses: of single examples, for each field of `Seen`."""
    found: dict[str, list[Any]] = {kind: [] for kind in losses}
    model.eval()
    for state in run.states:
        model.load_state_dict(state)
        for kind, of_kind in losses.items():
            found[kind].append(examples_at(model, blocks, of_kind))
    return Seen(**found)
