"""Rows that a model moves: packed, routed, sorted or picked ones, of which no order tells to whom they belong.

A forward is watched where torch dispatches it. What comes of an operation that moves rows of its first axis, and all
that is made of that, is moved, until it is put into its place in a tensor that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .layers.tracked import TrackedLayer
from .taps import forward_hooks

_aten = torch.ops.aten
_PICKS = {_aten.index_select, _aten.gather, _aten.sort, _aten.topk, _aten.unique_dim, _aten.repeat_interleave}
_ALWAYS = {_aten.masked_select, _aten.take, _aten._unique2, _aten.unique_consecutive}
_TURNS = {_aten.flip, _aten.roll}
_COPIES = {_aten._to_copy, _aten.clone}
_PUTS = {
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
    _aten.index_add,
    _aten.index_add_,
    _aten.index_copy,
    _aten.index_copy_,
    _aten.scatter,
    _aten.scatter_,
    _aten.scatter_add,
    _aten.scatter_add_,
    _aten.masked_scatter,
    _aten.masked_scatter_,
}


def moved_layers(layers: Mapping[str, TrackedLayer], content: Any, run: Callable[[], Any]) -> list[str]:
    """The layers some of whose calls get rows that were moved.

    content: of a batch, of whose rows it is asked (those of tables and positions may be looked up in any order);
    run: a forward of the model on it.
    """
    watch, found = _Watch(content), set[str]()
    uses: dict[nn.Module, list[tuple[str, TrackedLayer]]] = {}
    for name, layer in layers.items():
        for use in layer.uses:
            uses.setdefault(use.module, []).append((name, use))

    def see(of_module: list[tuple[str, TrackedLayer]], _module: Any, args: Any, kwargs: Any, _output: Any) -> None:
        if any(map(watch.is_moved, tree_leaves((args, kwargs)))):
            found.update(name for name, _ in of_module)

    hooks = {module: partial(see, of_module) for module, of_module in uses.items()}
    with torch.enable_grad(), forward_hooks(hooks), watch:
        run()
    return [name for name in layers if name in found]


class _Watch(TorchDispatchMode):
    """Inside, what is made of moved rows is known by its memory, which is kept until the watch ends."""

    def __init__(self, content: Any) -> None:
        super().__init__()
        tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
        self._data = {_memory(tensor): tensor for tensor in tensors}  # what is made of the batch
        self._all_is_data = not tensors
        self._moved: dict[int, Tensor] = {}
        self._orders: dict[int, Tensor] = {}  # what torch.arange made: an order that no data has a say in

    def is_moved(self, leaf: Any) -> bool:
        """Whether a tensor holds rows that were moved."""
        return isinstance(leaf, Tensor) and _memory(leaf) in self._moved

    def _is_data(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (self._all_is_data or _memory(leaf) in self._data)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet is _aten.arange or (packet in _COPIES and _memory(args[0]) in self._orders):
            self._orders[_memory(result)] = result
        leaves = tree_leaves((args, kwargs))
        if any(map(self._is_data, leaves)):
            self._data |= {_memory(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        if packet in _PUTS:
            moved = self.is_moved(args[0])
        elif not self._is_data(args[0] if args else None):
            moved = any(map(self.is_moved, leaves))
        elif packet is _aten.index:
            first = args[1][0]
            ordered = first is None or (_memory(first) in self._orders and _in_order(first, args[0].shape[0]))
            moved = not ordered or any(map(self.is_moved, leaves))
        else:
            moved = _moves(packet, args, kwargs) or any(map(self.is_moved, leaves))
        for leaf in tree_leaves(result) if moved else ():
            if isinstance(leaf, Tensor):
                self._moved[_memory(leaf)] = leaf
        return result


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # of a kind of tensor that has none of its own
        return id(tensor)


def _moves(packet: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation moves rows of its first axis, from one example to another or out of their number."""
    if packet in _ALWAYS:
        return True
    if packet in _TURNS:
        tensor, axes = args[0], (args[1:] and args[-1]) or kwargs.get("dims", ())
        return any(axis % max(1, tensor.ndim) == 0 for axis in axes)
    if packet in _PICKS and isinstance(args[0], Tensor) and args[0].ndim:
        numbers = [arg for arg in (*args[1:], *kwargs.values()) if isinstance(arg, int) and not isinstance(arg, bool)]
        axis = kwargs.get("dim", (numbers or [0])[-1] if packet in (_aten.sort, _aten.topk) else (numbers or [0])[0])
        return bool(axis % args[0].ndim == 0) and args[0].ndim > 1
    return False


def _in_order(index: Tensor, rows: int) -> bool:
    """Whether an index takes every row of the first axis once and in order."""
    order = torch.arange(rows, device=index.device)
    flat = index.reshape(len(index), -1) if index.ndim else index.reshape(1, 1)
    return len(flat) == rows and bool((flat == order[:, None]).all())
