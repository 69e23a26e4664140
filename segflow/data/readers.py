"""Readers: a dataset in batches, and as the digest that binds units of the store to it.

How one batch is read stands in `reading.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from ..errors import SegflowError, StoreError, TaskError
from ..runtime.progress import track
from ..runtime.ranks import Ranks
from ..runtime.sharding import to_device
from .batches import Batch, Collate, Indices, dataset_length, evenly_spaced, in_order
from .fingerprints import digest
from .reading import DIGEST, Answer, InWorker, Reading, Request

_LARGE = 1024  # a longer TensorDataset is told by its tensors, a shorter one as any dataset of its examples
_PIECE = 256  # examples that are read together for their digests alone
_REREAD = 16  # examples that are read twice, to see whether they are alike
TRAINING = "training"  # the role of training data


class Reader:
    """Reads a dataset for one Analyzer: in batches, and as the digest that binds units of the store to it.

    The digest is taken of examples as passes read them, and of those that no pass has read when it is asked for. The
    dataset may change between two calls of the Analyzer, so each call compares what it reads with what is known.

    Args:
        dataset, collate_fn: as for a DataLoader; None for torch's default.
        role: names the dataset in errors.
        seed: of what reading draws at random.
        workers: processes that read, each its share of the batches; 0: this one reads.
        digesting: whether examples are digested as they are read.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Collate | None = None,
        role: str = "given",
        *,
        seed: int = 0,
        workers: int = 0,
        digesting: bool = False,
    ):
        self.dataset, self.role, self.workers, self.digesting = dataset, role, workers, digesting
        self._length = dataset_length(dataset, role)
        self._reading = Reading(dataset, collate_fn, role, seed)
        self._collates = collate_fn is not None
        self._is_plain = type(dataset) is TensorDataset and not self._collates
        self._digests_N = np.zeros((self._length, DIGEST), np.uint8)
        self._known_N = np.zeros(self._length, bool)  # whose digest is known, and
        self._seen_N = np.zeros(self._length, bool)  # whose digest was taken in this call, and
        self._walked_N = np.zeros(self._length, bool)  # that of what a batch held
        self._new: list[int] = []  # those of these that other ranks do not know of
        self._whole: dict[range, str] = {}  # of a plain TensorDataset, digests of rows in this call
        self._asked = self._is_steady = False

    def __len__(self) -> int:
        return self._length

    def begin(self, digesting: bool) -> None:
        """A call of the Analyzer begins: what was read before may have changed since."""
        self.digesting, self._asked = digesting, False
        self._whole.clear()
        self._seen_N[:] = self._walked_N[:] = False
        self._reading.kept.clear()

    def batches(self, lists: Sequence[Indices], device: torch.device, idle: int = 0, views: int = 1) -> Iterator[Batch]:
        """Yield a collated batch on `device` for each list of example indices, in that order; then `idle` idle batches.

        views: how often each list is read in a row, each time as another view of its examples.
        """
        requests = [Request(np.asarray(indices).tolist(), view) for indices in lists for view in range(views)]
        return self.read(requests, device, idle)

    def read(self, requests: Sequence[Request], device: torch.device, idle: int = 0) -> Iterator[Batch]:
        """Yield a batch for each request; then `idle` idle ones."""
        wanted = [*requests, *[Request([0])] * idle]
        contents = self._contents(wanted)
        for number, (request, content) in enumerate(zip(wanted, contents, strict=True)):
            alone = partial(self._alone, request, device)
            yield Batch(request.examples, to_device(content, device), number >= len(requests), alone=alone)

    def _alone(self, request: Request, device: torch.device) -> Iterator[Batch]:
        """Each example of a batch once more, in a batch of its own."""
        for index in request.examples:
            single = Request([index], request.view)
            content = [tensor[[index]] for tensor in self.dataset.tensors] if self._is_plain else None
            content = self._reading[single].content if content is None else content
            yield Batch(single.examples, to_device(content, device))

    def probes(self, lists: Sequence[Indices], device: torch.device) -> list[Batch]:
        """Batches of a few examples; each is read once in a call of the Analyzer, however often it is asked for."""
        with self._keeping():
            return list(self.batches(lists, device))

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        self._reading.keeps = True
        try:
            yield
        finally:
            self._reading.keeps = False

    def _contents(self, requests: Sequence[Request]) -> Iterator[Any]:
        """What each batch holds; a plain TensorDataset is indexed as a whole."""
        if self._is_plain:
            return ([tensor[request.examples] for tensor in self.dataset.tensors] for request in requests)
        return (answer.content for answer in self._answers(requests))

    def _answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        wanted, keeps = list(self._with_digests(requests)), self._reading.keeps
        by_workers = self.workers and len(wanted) > 1 and not keeps
        answers = self._by_workers(wanted) if by_workers else map(self._reading.__getitem__, wanted)
        for request, answer in zip(wanted, answers, strict=True):
            self._reading.draws |= answer.draws
            for index, of_example in zip(request.digested, answer.digests, strict=True):
                self._note(index, of_example)
            if request.joined and not keeps:
                self._walked_N[request.digested] = True
            yield answer

    def _by_workers(self, wanted: Sequence[Request]) -> Iterator[Answer]:
        """The answers of worker processes, in order; their errors are raised here, as they would be without workers."""
        loader: DataLoader[Any] = DataLoader(
            InWorker(self._reading),  # type: ignore[arg-type]
            batch_size=None,
            sampler=wanted,
            collate_fn=_as_is,
            num_workers=self.workers,
            generator=torch.Generator(),
        )
        try:
            for answer in loader:
                if isinstance(answer, SegflowError):
                    raise answer
                yield answer
        except RuntimeError as problem:
            if "DataLoader worker" not in str(problem):
                raise
            raise TaskError(
                f"a worker that read the {self.role} data ended ({str(problem).splitlines()[0]}). Look at the memory "
                "that processes share, or read with num_workers=0."
            ) from problem

    def _with_digests(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests, each of which asks for its examples' digests where they are taken as batches are read.

        With a collate function of the user's, which is called for each digest, only the first that has an example in
        this call does.
        """
        taken_N = self._walked_N.copy() if self._collates else np.zeros(self._length, bool)
        for request in requests:
            if not self.digesting or request.view or not request.joined:
                yield request
                continue
            fresh = [index for index in dict.fromkeys(request.examples) if not taken_N[index]]
            taken_N[fresh] = self._collates
            yield request._replace(digested=fresh)

    def _note(self, index: int, of_example: bytes) -> None:
        """Note an example's digest; StoreError where it was another before."""
        if self._known_N[index] and self._digests_N[index].tobytes() != of_example:
            raise StoreError(
                f"example {index} of the {self.role} data is not what it was when this Analyzer read it first (here or "
                "on another rank). Give data that is read alike each time and everywhere, and to `score` that which "
                "`fit` was given; for other data make another Analyzer, with another store."
            )
        self._digests_N[index] = np.frombuffer(of_example, np.uint8)
        self._known_N[index] = self._seen_N[index] = True
        self._new.append(index)

    def check_steady(self, ranks: Ranks) -> None:
        """Raise TaskError where reading some examples twice differs, RankError where they differ between the ranks."""
        if self._is_steady:
            return
        ranks.agree(f"the {self.role} dataset's length", self._length)
        rows = evenly_spaced(self._length, _REREAD)
        if self._is_plain:
            self._agree(ranks, [digest([tensor[rows] for tensor in self.dataset.tensors])])
            return
        first, again = self._twice(rows)
        if first != again:  # a generator may have been made at the first reading
            self._reading.look_for_generators()
            first, again = self._twice(rows)
        for index, *both in zip(rows, first, again, strict=True):
            if both[0] != both[1]:
                self._known_N[:] = False
                raise TaskError(
                    f"example {index} of the {self.role} data is another each time it is read, although the random "
                    "functions of Python, NumPy and torch, and those generators that were found in the dataset, began "
                    "at the same seed. Draw from these, or give data that is read alike each time."
                )
        self._agree(ranks, [of_example.hex() for of_example in first])

    def _agree(self, ranks: Ranks, digests: list[str]) -> None:
        """Raise RankError where digests of some examples differ between the ranks; note that all is well."""
        ranks.agree(f"some examples of the {self.role} dataset (does every rank build it with the same seed?)", digests)
        self._is_steady = True

    def _twice(self, rows: list[int]) -> tuple[list[bytes], list[bytes]]:
        """The digests of some examples, read twice."""
        request = Request(rows, digested=rows, joined=False)
        with self._keeping():
            first = self._reading[request]
        return first.digests, self._reading[request].digests

    def fingerprint(self, ranks: Ranks, progress: bool | None = None, rows: range | None = None) -> dict[str, Any]:
        """The number of some examples (None: of all), and a digest of what each of them holds; on every rank.

        Examples that no pass of this Analyzer has read yet are read, by each rank a share.
        """
        self.check_steady(ranks)
        rows = range(self._length) if rows is None else rows
        if self._is_plain and rows not in self._whole:
            self._whole[rows] = digest([tensor[rows.start : rows.stop] for tensor in self.dataset.tensors])
            ranks.agree(f"the {self.role} dataset", self._whole[rows])
        if self._is_plain and self._length > _LARGE:
            return {"length": len(rows), "examples": self._whole[rows]}
        self._asked = True
        self._exchange(ranks)
        chosen = slice(rows.start, rows.stop)
        self._read_for_digests((np.flatnonzero(~self._known_N[chosen]) + rows.start).tolist(), ranks, progress)
        return {"length": len(rows), "examples": digest(self._digests_N[chosen])}

    def confirm(self, ranks: Ranks, progress: bool | None = None) -> None:
        """Raise StoreError, at the end of a call that relied on digests, where an example is no longer what it was."""
        if self._asked:
            self._exchange(ranks)
            self._read_for_digests(np.flatnonzero(self._known_N & ~self._seen_N).tolist(), ranks, progress)

    def _read_for_digests(self, indices: Sequence[int], ranks: Ranks, progress: bool | None) -> None:
        """Read some examples for their digests; each rank does a share."""
        if not indices:
            return
        pieces = [[indices[place] for place in piece] for piece in in_order(len(indices), _PIECE)]
        requests = [Request(piece, digested=piece, joined=False) for piece in ranks.share(pieces)]
        for _ in track(self._answers(requests), f"reading the {self.role} data", len(requests), enabled=progress):
            pass
        self._exchange(ranks)

    def _exchange(self, ranks: Ranks) -> None:
        """Make known to every rank which digests each has noted."""
        if ranks.count > 1:
            for of_rank in ranks.gather([(index, self._digests_N[index].tobytes().hex()) for index in self._new]):
                for index, of_example in of_rank:
                    self._note(index, bytes.fromhex(of_example))
        self._new.clear()


class Readers:
    """The readers of the datasets of an Analyzer: one for each dataset and collate function.

    Those of training data are kept until a call does without them, those of other data until the next call.

    Args:
        seed, workers: as for a Reader.
    """

    def __init__(self, seed: int, workers: int):
        self._seed, self._workers = seed, workers
        self._digesting = False
        self._readers: dict[tuple[int, int], Reader] = {}
        self._used: set[tuple[int, int]] = set()  # in this call

    def begin(self, digesting: bool) -> None:
        """A call begins, in which digests are taken or not."""
        self._digesting = digesting
        readers = self._readers.items()
        self._readers = {key: reader for key, reader in readers if key in self._used and reader.role == TRAINING}
        self._used.clear()
        for reader in self._readers.values():
            reader.begin(digesting)

    def of(self, dataset: Any, collate_fn: Collate | None, role: str) -> Reader:
        """The reader of a dataset."""
        key = id(dataset), id(collate_fn)  # the reader holds both, so that nothing else can have their ids
        self._used.add(key)
        if key not in self._readers:
            self._readers[key] = Reader(
                dataset, collate_fn, role, seed=self._seed, workers=self._workers, digesting=self._digesting
            )
        elif role == TRAINING:  # data that is asked about as well
            self._readers[key].role = role
        return self._readers[key]

    def confirm(self, ranks: Ranks, progress: bool | None) -> None:
        """Raise StoreError, at the end of a call, where data that it relied on has changed since it was read."""
        for reader in list(self._readers.values()):
            reader.confirm(ranks, progress)


def batches(
    dataset: Any, index_lists: Sequence[Indices], collate_fn: Collate | None, device: torch.device
) -> Iterator[Batch]:
    """Yield a collated batch on `device` for each list of example indices, in that order."""
    return Reader(dataset, collate_fn).batches(index_lists, device)


def _as_is(answer: Any) -> Any:
    return answer
