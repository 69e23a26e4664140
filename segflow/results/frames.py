"""Scores as NumPy arrays, pandas and xarray have them. Axes: Q queries, K groups."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_numpy(part: Tensor) -> np.ndarray:
    """A NumPy array; numbers in bfloat16, which NumPy lacks, in single precision."""
    array: np.ndarray = (part.float() if part.dtype == torch.bfloat16 else part).detach().cpu().numpy()
    return array


def frame(values_QK: Tensor, queries: Sequence[str], groups: Sequence[str]) -> Any:
    """A pandas DataFrame: one row for each query, one column for each group."""
    import pandas

    index = pandas.Index(queries, name="query")
    return pandas.DataFrame(as_numpy(values_QK), index=index, columns=pandas.Index(groups, name="group"))


def dataset(
    values_QK: Tensor,
    queries: Sequence[str],
    groups: Sequence[str],
    sizes: Sequence[int],
    spread_QK: Tensor | None,
    parts: Mapping[str, Mapping[str, Tensor]],
    provenance: Mapping[str, Any],
) -> Any:
    """An xarray Dataset: values (query, group), group_size, spread if there, and each kind of parts that there are."""
    import xarray

    coords: dict[str, Any] = {"query": list(queries), "group": list(groups)}
    data: dict[str, Any] = {"values": (("query", "group"), as_numpy(values_QK))}
    data["group_size"] = (("group",), np.array(sizes))
    if spread_QK is not None:
        data["spread"] = (("query", "group"), as_numpy(spread_QK))
    for kind, of_kind in parts.items():
        if of_kind:
            axis = kind.removeprefix("by_")
            coords[axis] = list(of_kind)
            data[kind] = ((axis, "query", "group"), np.stack([as_numpy(part) for part in of_kind.values()]))
    return xarray.Dataset(data, coords, attrs={"provenance": json.dumps(provenance)})
