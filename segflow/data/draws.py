"""Draws for a batch: random numbers that depend on (seed, place, example) only, as pseudo-labels and masks must.

Random functions that run inside `drawing` are caught where torch dispatches them, and answered by a hash of the
example's key, the draw's number among those of the batch, and the place within the example's share of the result.

Axes: B examples, R rows of a result, C categories, N draws from a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import TaskError

_aten = torch.ops.aten
# The constants of splitmix64 (Steele et al. 2014), as signed integers.
_GOLDEN, _FACTORS = -7046029254386353131, (-4658895280553007687, -7723592293110705685)


@contextmanager
def drawing(
    seed: int, place: object, examples: Sequence[int] | np.ndarray, own_generators: bool = False
) -> Iterator[None]:
    """Inside, what random functions draw for an example of the batch depends on (seed, place, its index) only.

    This holds for uniform, integer, normal, exponential, Bernoulli and multinomial draws (so for Categorical, Normal
    and the like of torch.distributions) whose result has the examples on its first axis, on its second, or flattened
    with their positions. All other draws, and those for a selection of rows, come from a generator that depends on the
    batch as well. NumPy's and Python's random functions cannot be caught. The caller's random state does not move.

    Args:
        place: what else the numbers shall depend on, such as a checkpoint's step.
        examples: the indices of the batch's examples in their dataset, in order.
        own_generators: whether draws from a generator that is passed to a function are answered too.
    """
    indices = [int(index) for index in examples]
    digest = hashlib.sha256(repr((seed, place)).encode()).digest()
    root = int.from_bytes(digest[:8], "little", signed=True)
    batch_digest = hashlib.sha256(repr((seed, place, indices)).encode()).digest()
    keys_B = _mixed(torch.tensor(indices) * _GOLDEN + root)
    with seeded(int.from_bytes(batch_digest[:7], "little")), _Draws(keys_B, own_generators):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's generators of the CPU and the current device begin at a seed; afterwards they are as before.

    Unlike torch.manual_seed it asks no device that nobody uses, which would take half a millisecond.
    """
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class _NoExamples(Exception):
    """The result of a draw has no share for each example."""


class _Draws(TorchDispatchMode):
    """Inside, answers the random functions that are called for a batch whose examples have these keys [B]."""

    def __init__(self, keys_B: Tensor, own_generators: bool):
        super().__init__()
        self._keys_B, self._own_generators = keys_B, own_generators
        self._draws = 0  # how many draws there were so far

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sampler = _SAMPLERS.get(func)
        if sampler is None or (kwargs.get("generator") is not None and not self._own_generators):
            return func(*args, **kwargs)
        if "generator" in kwargs:
            kwargs = kwargs | {"generator": None}
        self._draws += 1
        try:
            return sampler(self._uniforms, *args, **kwargs)
        except _NoExamples:
            return func(*args, **kwargs)  # from the batch's own seed

    def _uniforms(self, like: Tensor, draws: int = 0) -> Tensor:
        """Uniform numbers in (0, 1), in float64, of a tensor's shape; its last axis is `draws` long if that is given.

        Raises _NoExamples if the tensor has no axis of examples.
        """
        shape = (*like.shape[:-1], draws) if draws else tuple(like.shape)
        B = len(self._keys_B)
        rows = shape[0] if shape else 0
        if rows and rows % B == 0:
            places = torch.arange(math.prod(shape) // B, device=like.device)[None, :]
            keys = self._keys_B.to(like.device)[:, None]
        elif len(shape) > 1 and shape[1] == B:  # sequences first
            inner = math.prod(shape[2:])
            places = torch.arange(rows * inner, device=like.device).reshape(rows, 1, inner)
            keys = self._keys_B.to(like.device)[None, :, None]
        else:
            raise _NoExamples
        draw = torch.tensor(self._draws, device=like.device) * _GOLDEN
        bits = _mixed(_mixed(keys + draw) + places * _GOLDEN)
        return ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53).reshape(shape)


def _mixed(bits: Tensor) -> Tensor:
    """splitmix64's finaliser on signed 64-bit integers, which wrap around."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


Uniforms = Callable[..., Tensor]  # _Draws._uniforms, bound to a batch


def _rand_like(uniforms: Uniforms, like: Tensor, **options: Any) -> Tensor:
    return _converted(uniforms(like), like, options)


def _randn_like(uniforms: Uniforms, like: Tensor, **options: Any) -> Tensor:
    return _converted(_normal(uniforms(like)), like, options)


def _rand(uniforms: Uniforms, size: Sequence[int], **options: Any) -> Tensor:
    return _rand_like(uniforms, _empty(size, options))


def _randn(uniforms: Uniforms, size: Sequence[int], **options: Any) -> Tensor:
    return _randn_like(uniforms, _empty(size, options))


def _randint(uniforms: Uniforms, *bounds_and_size: Any, **options: Any) -> Tensor:
    *bounds, size = bounds_and_size
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    like = torch.empty(tuple(size), dtype=options.get("dtype") or torch.int64, device=options.get("device"))
    return like.copy_((uniforms(like) * (high - low)).floor().clamp_max(high - low - 1) + low)


def _uniform_(uniforms: Uniforms, target: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return target.copy_(low + (high - low) * _rand_like(uniforms, target))


def _normal_(uniforms: Uniforms, target: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return target.copy_(mean + std * _normal(uniforms(target)))


def _normal_of_parameters(uniforms: Uniforms, mean: Any, std: Any = 1.0, *_: Any, **__: Any) -> Tensor:
    like = mean if isinstance(mean, Tensor) else std
    shape = torch.broadcast_shapes(*(t.shape for t in (mean, std) if isinstance(t, Tensor)))
    drawn: Tensor = mean + std * _normal(uniforms(like.new_empty(shape))).to(like.dtype)
    return drawn


def _exponential_(uniforms: Uniforms, target: Tensor, rate: float = 1.0, **_: Any) -> Tensor:
    times = (uniforms(target).log().neg() / rate).to(target.dtype)
    return target.copy_(times.clamp_min(torch.finfo(target.dtype).tiny))


def _bernoulli(uniforms: Uniforms, p: Tensor, **_: Any) -> Tensor:
    return (uniforms(p) < p).to(p.dtype)


def _bernoulli_(uniforms: Uniforms, target: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
    return target.copy_(uniforms(target) < p)


def _multinomial(uniforms: Uniforms, p_RC: Tensor, draws: int, replacement: bool = False, **_: Any) -> Tensor:
    """Draws from each row by the inverse of its distribution function; without replacement, by exponential races."""
    if p_RC.ndim != 2:
        raise _NoExamples
    p = p_RC.double()
    _require_probabilities(p)
    if draws > 1 and not replacement:
        return (p / uniforms(p_RC).log().neg()).topk(draws, -1).indices
    ends_RC = p.cumsum(-1)
    drawn_RN = torch.searchsorted(ends_RC, uniforms(p_RC, draws) * ends_RC[:, -1:], right=True)
    last_R1 = p.shape[-1] - 1 - (p > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)  # where rounding must end
    return torch.minimum(drawn_RN, last_R1)


def _require_probabilities(p_RC: Tensor) -> None:
    """Raise TaskError unless labels can be drawn; an accelerator, for which nothing waits, ends with an assertion."""
    right_R = torch.isfinite(p_RC).all(-1) & (p_RC >= 0).all(-1) & (p_RC.sum(-1) > 0)
    text = "the probabilities that labels are drawn from are not all finite, at least 0, and above 0 in sum"
    if p_RC.device.type != "cpu":
        torch._assert_async(right_R.all(), text)
    elif not right_R.all():
        row = int((~right_R).nonzero()[0])
        raise TaskError(
            f"{text}: row {row} is {p_RC[row, :4].tolist()}{'...' if p_RC.shape[1] > 4 else ''}. Its inputs hold NaN "
            "or infinity, or the model's outputs are not finite at this checkpoint."
        )


def _normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u)


def _converted(values: Tensor, like: Tensor, options: dict[str, Any]) -> Tensor:
    """The numbers in the dtype and on the device of the options, else of `like`; those below 1 stay below it."""
    dtype, device = options.get("dtype") or like.dtype, options.get("device") or like.device
    rounded = values.to(device, dtype)
    return torch.where((values < 1).to(device) & (rounded == 1), 1 - torch.finfo(dtype).eps / 2, rounded)


def _empty(size: Sequence[int], options: dict[str, Any]) -> Tensor:
    return torch.empty(tuple(size), dtype=options.get("dtype"), device=options.get("device"))


_SAMPLERS: dict[Any, Callable[..., Tensor]] = {
    _aten.rand_like.default: _rand_like,
    _aten.randn_like.default: _randn_like,
    _aten.rand.default: _rand,
    _aten.randn.default: _randn,
    _aten.randint.default: _randint,
    _aten.randint.low: _randint,
    _aten.randint.generator: _randint,
    _aten.randint.low_generator: _randint,
    _aten.rand.generator: _rand,
    _aten.randn.generator: _randn,
    _aten.uniform_.default: _uniform_,
    _aten.normal_.default: _normal_,
    _aten.normal.Tensor_float: _normal_of_parameters,
    _aten.normal.float_Tensor: _normal_of_parameters,
    _aten.normal.Tensor_Tensor: _normal_of_parameters,
    _aten.exponential_.default: _exponential_,
    _aten.bernoulli.default: _bernoulli,
    _aten.bernoulli_.float: _bernoulli_,
    _aten.bernoulli_.Tensor: _bernoulli_,
    _aten.multinomial.default: _multinomial,
}
