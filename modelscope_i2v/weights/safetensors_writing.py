"""Writing a safetensors file one tensor at a time: it takes the memory of one of them, not of all."""

from __future__ import annotations

import json
import os
from math import prod
from typing import Callable, Mapping

import torch
from torch import Tensor

from modelscope_i2v.weights.formats import SAFETENSORS_DTYPES
from modelscope_i2v.weights.stored_tensors import DTYPES

#: The dtype and the shape of each tensor of a file, by key.
Layout = Mapping[str, "tuple[torch.dtype, tuple[int, ...]]"]

_NAMES = {DTYPES[ours]: theirs for theirs, ours in SAFETENSORS_DTYPES.items() if ours in DTYPES}


def safetensors_size(layout: Layout) -> int:
    """How many bytes a file of such tensors has."""
    return len(_header(layout, _order(layout))) + sum(_nbytes(*entry) for entry in layout.values())


def write_safetensors(path: str | os.PathLike, layout: Layout, tensor_of: Callable[[str], Tensor]) -> None:
    """Write a file whose tensors are made when their turn comes.

    Args:
        path: the file, which is created or overwritten.
        layout: what each tensor will be.
        tensor_of: gives the tensor of a key; it is called once for each.

    Raises:
        OSError: as the system has it.
    """
    order = _order(layout)
    with open(path, "wb") as file:
        file.write(_header(layout, order))
        for key in order:
            tensor = tensor_of(key)
            if (tensor.dtype, tuple(tensor.shape)) != layout[key]:
                raise ValueError(f"{key}: announced as {layout[key]}, is {tensor.dtype}, {tensor.shape}")
            # Flat first: a tensor without dimensions cannot be viewed in another dtype.
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _order(layout: Layout) -> list[str]:
    """Wide numbers first, so that all of them are aligned."""
    return sorted(layout, key=lambda key: -layout[key][0].itemsize)


def _header(layout: Layout, order: list[str]) -> bytes:
    """The header and the length before it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # which other readers ask for
    position = 0
    for key in order:
        dtype, shape = layout[key]
        end = position + _nbytes(dtype, shape)
        entries[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # the data begin aligned
    return len(text).to_bytes(8, "little") + text


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.itemsize
