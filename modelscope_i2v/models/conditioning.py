"""What a call of the UNet gives to all its layers, and how they take their input in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """One per call of the UNet on B samples under k contexts each, k >= 1.

    Attributes:
        embedding: timestep (and frame rate), [B, 4 dim].
        context: what the spatial transformers attend to, [k B, M, context_dim], context by context.
        frames: F, of each sample.
        chunk: how many elements the largest tensor inside a layer may have, where the layer can take its
            input in parts; None for any number. It changes memory and time, not the result.
    """

    embedding: Tensor
    context: Tensor
    frames: int
    chunk: int | None = None


def repeat_to(x: Tensor, length: int) -> Tensor:
    """Repeat x [n, ..] as a whole, once for each context, to [length, ..]."""
    return x if len(x) == length else torch.cat([x] * (length // len(x)))


def in_frame_groups(
    function: Callable[[slice, slice], Tensor], x: Tensor, conditioning: Conditioning, expansion: int = 1
) -> Tensor:
    """Apply a function to groups of frames, as many at a time as ``chunk`` allows.

    Args:
        function: takes two slices, of the frames in (b f) and of their samples in b, and returns one entry
            for each of these frames, [n, ..].
        x: what it is a function of, [b f, c, h, w].
        conditioning: gives ``frames`` and ``chunk``.
        expansion: how many times x's elements the largest tensor inside the function has.

    Returns:
        The entries of all frames, [b f, ..].
    """
    frames, chunk = conditioning.frames, conditioning.chunk
    if chunk is None or x.numel() * expansion <= chunk:
        return function(slice(None), slice(None))
    result = None
    for sample, start in enumerate(range(0, len(x), frames)):
        for group in chunks(frames, x[0].numel() * expansion, chunk):
            group = slice(start + group.start, start + group.stop)
            part = function(group, slice(sample, sample + 1))
            if result is None:
                layout = torch.channels_last if part.ndim == 4 else torch.contiguous_format
                shape = (len(x), *part.shape[1:])
                result = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
            result[group] = part
    assert result is not None  # x with no frames has no elements, and was returned above
    return result


def chunks(count: int, elements: int, chunk: int | None) -> Iterator[slice]:
    """Yield slices, nearly equal, of ``count`` things that make ``elements`` elements each."""
    groups = 1 if chunk is None else min(-(-count * elements // chunk), count)
    for group in range(groups):
        yield slice(count * group // groups, count * (group + 1) // groups)
