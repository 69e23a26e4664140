"""One process or many: the ranks of a run, and the collectives by which they share its work.

Tensors travel as bytes and other values as JSON, so any dtype goes and nothing is unpickled. Collectives are polled, so
that a rank that fails or dies meanwhile is an error that names it (liveness.py).
"""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch import distributed as dist

from ..errors import RankError
from .liveness import Peers, rank_timeout
from .rendezvous import Rendezvous

Item = TypeVar("Item")
Header = tuple[str, list[int]] | None  # a tensor's dtype and shape; None where there is no tensor
_PACKET = 2048  # bytes of JSON that travel in one go
_BUCKET = 64 << 20  # bytes that are summed in one go
_LOOK_EVERY = 0.25  # seconds between two looks at the other ranks
_MEET_WITHIN = 60.0  # seconds for making a process group, once every rank has arrived
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The processes that share one run's work; by default this one alone.

    Every rank must make the same calls in the same order, inside `together`.
    """

    def __init__(self, index: int = 0, count: int = 1, peers: Peers | None = None):
        self.index, self.count = index, count
        self._peers = peers
        self._group: Any = None
        self._depth = 0
        self._device = torch.device("cpu")

    @property
    def main(self) -> bool:
        """True on the rank that touches the store and the terminal."""
        return self.index == 0

    @property
    def local_count(self) -> int:
        """How many ranks this machine runs."""
        return min(self.count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's items: every count-th."""
        return list(items[self.index :: self.count])

    @contextmanager
    def together(self, call: str) -> Iterator[None]:
        """One call on all ranks: it begins when every rank has arrived, and an exception in one ends it on the others.

        call: its name, for errors. Raises RankError where another rank fails, ends, dies or makes another call.
        """
        if self._peers is None or self._depth:
            yield
            return
        self._depth += 1
        try:
            if self._peers.arrive(call) or self._group is None:
                self._group = self._new_group()
            yield
            self.gather(None)  # nobody leaves before all are done
        except BaseException as problem:
            if isinstance(problem, RuntimeError) and any(name in str(problem) for name in ("gloo", "NCCL")):
                raise self._peers.explain(problem) from problem  # in what a sharded model's layers exchange
            if not isinstance(problem, RankError):
                self._peers.post(f"failed: {type(problem).__name__}: {str(problem)[:500].partition(chr(10))[0]}")
            raise
        finally:
            self._depth -= 1

    def same(self, value: Any = None) -> Any:
        """Rank 0's value, as JSON can hold it, on every rank; what the others give is ignored."""
        return value if self.count == 1 else self._from_source(value, 0)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, as JSON can hold it, in rank order, on every rank."""
        if self.count == 1:
            return [value]
        content = json.dumps(value).encode()
        packets = [self._room(_PACKET + 8) for _ in range(self.count)]
        self._run(dist.all_gather, packets, self._packet(content))
        sizes = [_size(packet) for packet in packets]
        if max(sizes) > _PACKET:
            packets = [self._room(max(sizes) + 8) for _ in sizes]
            self._run(dist.all_gather, packets, self._packet(content, max(sizes)))
        return [json.loads(_content(packet, size)) for packet, size in zip(packets, sizes, strict=True)]

    def agree(self, what: str, value: Any) -> None:
        """Raise RankError unless the value, as JSON can hold it, is the same on every rank; what: names it."""
        values = [json.dumps(each, sort_keys=True) for each in self.gather(value)]
        for rank, each in enumerate(values):
            if each != values[0]:
                raise RankError(
                    f"{what}: not the same on every rank. Rank 0 has {values[0][:300]}, rank {rank} has "
                    f"{each[:300]}. Every rank must run the same script on the same data with the same seeds."
                )

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place, on every rank."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(self._device)
            if len(flat):
                self._run(dist.all_reduce, flat)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view(tensor.shape))

    def broadcast(self, tensor: Tensor | None, source: int = 0, device: torch.device | None = None) -> Tensor:
        """The source's tensor on every rank; the others give None. device: where it is wanted, else the CPU."""
        if self.count == 1 and tensor is not None:
            return tensor if device is None else tensor.to(device)
        sent = tensor if self.index == source else None
        header = self._from_source(_header(sent), source)
        content = self._room(_length(header)) if sent is None else self._bytes(sent)
        if len(content):
            self._run(dist.broadcast, content, source)
        if sent is not None:
            return sent if device is None else sent.to(device)
        return _tensor(content, header, device or torch.device("cpu"))  # type: ignore[return-value]

    def collect(self, tensor: Tensor | None) -> list[Tensor | None]:
        """Every rank's tensor (of any shape, or None) on rank 0, in rank order and on its device; elsewhere nothing."""
        if self.count == 1:
            return [tensor]
        headers = self.gather(_header(tensor))
        length = max(map(_length, headers))
        parts = [self._room(length) for _ in headers] if self.main else None
        if length:
            self._run(dist.gather, self._padded(tensor, length), parts, 0)
        if parts is None:
            return []
        device = self._device if tensor is None else tensor.device
        return [_tensor(part, header, device) for part, header in zip(parts, headers, strict=True)]

    def deal(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
        """Rank 0 gives a tensor (or None) for every rank; each gets its own, on its device."""
        if self.count == 1:
            return None if tensors[0] is None else tensors[0].to(device)
        headers = self._from_source([_header(tensor) for tensor in tensors], 0)
        length = max(map(_length, headers))
        content = self._room(length)
        if length:
            self._run(
                dist.scatter, content, [self._padded(tensor, length) for tensor in tensors] if self.main else None, 0
            )
        return _tensor(content, headers[self.index], device)

    def _from_source(self, value: Any, source: int) -> Any:
        content = json.dumps(value).encode() if self.index == source else b""
        packet = self._packet(content)
        self._run(dist.broadcast, packet, source)
        size = _size(packet)
        if size > _PACKET:
            packet = self._packet(content, size)
            self._run(dist.broadcast, packet, source)
        return json.loads(_content(packet, size))

    def _packet(self, content: bytes, room: int = _PACKET) -> Tensor:
        """The content's length and as much of it as there is room for."""
        held = len(content).to_bytes(8, "little") + content[:room].ljust(room, b"\0")
        return torch.frombuffer(bytearray(held), dtype=torch.uint8).to(self._device)

    def _room(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.uint8, device=self._device)

    def _bytes(self, tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(self._device)

    def _padded(self, tensor: Tensor | None, length: int) -> Tensor:
        content = self._room(length)
        if tensor is not None and tensor.numel():
            held = self._bytes(tensor)
            content[: len(held)] = held
        return content

    def _new_group(self) -> Any:
        """A process group apart from the user's, so that their collectives never mix with ours."""
        if self._group is not None:
            with suppress(RuntimeError):
                dist.destroy_process_group(self._group)
        group = dist.new_group(timeout=timedelta(seconds=_MEET_WITHIN))
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=rank_timeout()), group)
        if "gloo" not in str(dist.get_backend(group)):
            self._device = torch.device("cuda", torch.cuda.current_device())
        return group

    def _run(self, collective: Any, *arguments: Any) -> None:
        """Run a collective and wait for it, looking now and then whether another rank failed."""
        if self._peers is None or self._group is None or not self._depth:
            raise RankError("a collective outside of Ranks.together(): this is a fault of segflow's.")
        looked, pause = time.monotonic(), 0.0
        try:
            work = collective(*arguments, group=self._group, async_op=True)
            while not work.is_completed():
                time.sleep(pause)
                pause = min(0.02, pause + 2e-5)
                if time.monotonic() - looked > _LOOK_EVERY:
                    self._peers.require_all()
                    looked = time.monotonic()
            work.wait()
        except RuntimeError as problem:
            raise self._peers.explain(problem) from problem


_place: tuple[Any, Ranks] | None = None  # the default process group, and this process's place in it
_times_joined = 0  # how many default process groups this process has been part of


def current() -> Ranks:
    """This process's place among those that a launcher started (accelerate, torchrun); alone without one."""
    global _place  # noqa: PLW0603
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return Ranks()
        PartialState(cpu=not torch.cuda.is_available())
    group = dist.group.WORLD
    if _place is None or _place[0] is not group:
        _place = (group, _join())
    return _place[1]


def _join() -> Ranks:
    """This process's place in the default process group, made known to the other ranks."""
    global _times_joined  # noqa: PLW0603
    index, count = dist.get_rank(), dist.get_world_size()
    if count == 1:
        return Ranks()
    _times_joined += 1
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=rank_timeout()))
    prefixed = dist.PrefixStore(f"segflow/{_times_joined}", store)  # type: ignore[attr-defined]
    return Ranks(index, count, Peers(Rendezvous(prefixed), index, count))


def leave() -> None:
    """Take no part any more: a child process is no rank, even if its parent is one."""
    global _place  # noqa: PLW0603
    if _place is not None and _place[1]._peers is not None:
        _place[1]._peers.leave()
    _place = None
    for name in _LAUNCHER:
        os.environ.pop(name, None)


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """The rank that takes each piece of work, the most costly first, each to the rank with least work so far.

    Example:
        >>> balanced([1, 4, 2, 2], 2)
        [0, 0, 1, 1]
    """
    loads = [(0.0, rank) for rank in range(count)]
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        load, rank = loads[0]
        owners[place] = rank
        heapq.heapreplace(loads, (load + costs[place], rank))
    return owners


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device together, up to a bucket's size."""
    bucket: list[Tensor] = []
    room = _BUCKET
    for tensor in tensors:
        room -= tensor.nbytes
        if bucket and (room < 0 or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, room = [], _BUCKET - tensor.nbytes
        bucket.append(tensor)
    if bucket:
        yield bucket


def _header(tensor: Tensor | None) -> Header:
    return None if tensor is None else (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))


def _length(header: Header) -> int:
    if header is None:
        return 0
    return torch.Size(header[1]).numel() * getattr(torch, header[0]).itemsize


def _tensor(content: Tensor, header: Header, device: torch.device) -> Tensor | None:
    if header is None:
        return None
    whole = content if len(content) == _length(header) else content[: _length(header)].clone()
    return whole.view(getattr(torch, header[0])).view(header[1]).to(device)


def _size(packet: Tensor) -> int:
    return int.from_bytes(packet[:8].cpu().numpy().tobytes(), "little")


def _content(packet: Tensor, size: int) -> bytes:
    return packet[8 : 8 + size].cpu().numpy().tobytes()
