"""Padding: examples of different lengths are joined into one batch. It draws nothing, and changes no example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import shown, whole_number
from ..errors import TaskError, check_choice
from .classification import IGNORED


class Padding:
    """A collate function for examples that are mappings: sequences are filled up to the longest, numbers are stacked.

    What is filled in follows from the key: `pad_id` for "input_ids" and what ends in "_input_ids", `ignore_index` for
    "labels" and "..._labels", and 0 for all else (masks, types). Where there are input ids and no attention mask of
    the same prefix, one is made.

    Args:
        pad_id: the tokenizer's `pad_token_id`; no result depends on it where a model honours the attention mask.
        side: where it is filled up, "right" or "left".
        ignore_index: the label of what is no target.
        fill: {key: what it is filled up with}, for labels of tokens under other keys, such as {"ner_tags": -100}.

    Example:
        >>> examples = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
        >>> batch = Padding(pad_id=9)(examples)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[1, 2, 3], [4, 9, 9]], [[1, 2, 3], [4, -100, -100]])
        >>> batch["attention_mask"].tolist()
        [[1, 1, 1], [1, 0, 0]]
    """

    def __init__(
        self,
        pad_id: int = 0,
        side: str = "right",
        ignore_index: int = IGNORED,
        fill: Mapping[str, int] | None = None,
    ):
        check_choice("side", side, ("left", "right"), TaskError)
        self.pad_id, self.side = whole_number("pad_id", pad_id, TaskError), side
        given = {key: whole_number(f"fill[{key!r}]", value, TaskError, -(2**62)) for key, value in (fill or {}).items()}
        self.fill = given
        self.ignore_index = whole_number("ignore_index", ignore_index, TaskError, -(2**62))

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some examples; TaskError where they do not have the same keys or shapes."""
        masked = [_with_mask(example) for example in examples]
        if odd := [n for n, example in enumerate(masked) if set(example) != set(masked[0])]:
            raise TaskError(
                f"pad: example {odd[0]} of the batch has the keys {shown(sorted(masked[odd[0]]))}, the first has "
                f"{shown(sorted(masked[0]))}. Give all examples the same."
            )
        return {key: self._joined(key, [example[key] for example in masked]) for key in masked[0]}

    def _joined(self, key: str, values: list[Any]) -> Any:
        if any(isinstance(value, str | bytes | None) for value in values):
            return values
        try:
            rows = [torch.as_tensor(value) for value in values]
        except (TypeError, ValueError, RuntimeError) as problem:
            raise TaskError(
                f"pad: {key!r} cannot be made a tensor ({problem}). Leave it out of the examples."
            ) from problem
        longest = max(len(row) if row.ndim == 1 else 0 for row in rows)
        filled = [self._filled(row, longest, self._fill(key)) if row.ndim == 1 else row for row in rows]
        if len({row.shape for row in filled}) > 1:
            raise TaskError(
                f"pad: {key!r} has the shapes {sorted({tuple(row.shape) for row in rows})}; only sequences [S] are "
                "filled up. Write a collate_fn of your own for it."
            )
        return torch.stack(filled)

    def _fill(self, key: str) -> int:
        if key in self.fill:
            return self.fill[key]
        name = key.rpartition("_")[2]
        if key.endswith("input_ids"):
            return self.pad_id
        return self.ignore_index if name == "labels" else 0

    def _filled(self, row_S: Tensor, longest: int, fill: int) -> Tensor:
        more = row_S.new_full((longest - len(row_S),), fill)
        return torch.cat([more, row_S] if self.side == "left" else [row_S, more])


def pad(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The batch of examples of different lengths: `Padding()`, on the right.

    Example:
        >>> pad([{"input_ids": [5, 6]}, {"input_ids": [7]}])["attention_mask"].tolist()
        [[1, 1], [1, 0]]
    """
    return Padding()(examples)


def _with_mask(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example with an attention mask for all of its input ids."""
    if not isinstance(example, Mapping):
        raise TaskError(f"pad: expected examples that are mappings, found {type(example).__name__}.")
    masks = {
        f"{key.removesuffix('input_ids')}attention_mask": torch.ones(len(ids), dtype=torch.long)
        for key, ids in example.items()
        if key.endswith("input_ids")
    }
    return masks | dict(example)
