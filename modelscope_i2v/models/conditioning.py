"""What the UNet's layers are told besides their input, and how much of it they may take at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Iterator, Mapping, Tuple

import torch
from torch import Tensor, nn

#: Of a context, what an attention sees: keys and values, each [B, M, heads, head_dim].
KeysValues = Tuple[Tensor, Tensor]
#: A context's keys and values for each spatial transformer.
Context = Mapping[nn.Module, KeysValues]


@dataclass(frozen=True)
class Conditioning:
    """One per call of the UNet, shared by all its layers.

    ``times`` is how many contexts there are for each sample of the UNet's input. ``chunk`` is how many
    elements the largest tensor inside a layer may have where the layer can take its input in parts, None for
    any number.
    """

    embedding: Tensor  # of timestep (and frame rate) [B, 4 dim]
    context: Context
    frames: int
    chunk: int | None = None
    times: int = 1

    def under(self, context: Context) -> Conditioning:
        """The same with a context, of B samples or of k B: then the embedding, too, is of k B."""
        keys, _ = next(iter(context.values()))
        times = keys.shape[0] // self.embedding.shape[0]
        return replace(self, embedding=self.embedding.repeat(times, 1), context=context, times=times)

    def repeated(self, x: Tensor) -> Tensor:
        """What all contexts share, once for each: [b f, ..] -> [times b f, ..]."""
        return x if self.times == 1 else torch.cat([x] * self.times)

    def context_of(self, transformer: nn.Module, samples: slice) -> KeysValues:
        """The keys and values of some samples."""
        keys, values = self.context[transformer]
        return keys[samples], values[samples]

    def in_frame_groups(
        self, function: Callable[[slice, slice], Tensor], x: Tensor, expansion: int = 1
    ) -> Tensor:
        """A function of frames, in groups of as many as ``chunk`` allows, its results put together.

        Args:
            function: of two slices, those of the frames in (b f) and of their samples in b; its result has
                one entry a frame, [n, ..].
            x: what it is a function of [b f, c, h, w].
            expansion: how many times x's elements the largest tensor inside the function has.
        """
        groups = list(self._frame_groups(x, expansion))
        if len(groups) == 1:
            return function(*groups[0])
        result = None
        for frames, samples in groups:
            part = function(frames, samples)
            if result is None:
                layout = torch.channels_last if part.ndim == 4 else torch.contiguous_format
                shape = (len(x), *part.shape[1:])
                result = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
            result[frames] = part
        return result

    def _frame_groups(self, x: Tensor, expansion: int) -> Iterator[tuple[slice, slice]]:
        if self.chunk is None or x.numel() * expansion <= self.chunk:
            yield slice(None), slice(None)
            return
        for sample, start in enumerate(range(0, len(x), self.frames)):
            for group in _groups(self.frames, x[0].numel() * expansion, self.chunk):
                yield slice(start + group.start, start + group.stop), slice(sample, sample + 1)

    def pixel_groups(self, video: Tensor, expansion: int = 1) -> Iterator[slice]:
        """Slices of the pixels of a video [f, p, c], as many at a time as ``chunk`` allows."""
        frames, pixels, width = video.shape
        return _groups(pixels, frames * width * expansion, self.chunk)


def _groups(count: int, elements: int, chunk: int | None) -> Iterator[slice]:
    """Slices, nearly equal, of a number of things of so many elements each."""
    groups = 1 if chunk is None else min(-(-count * elements // chunk), count)
    for group in range(groups):
        yield slice(count * group // groups, count * (group + 1) // groups)
