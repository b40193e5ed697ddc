"""The autoencoder over large frames, a strip of rows at a time, with the whole frame's result.

What is between two layers lies in memory as a whole, what is inside a layer does not: it takes strips, with
the rows beyond them that its convolutions see, and GroupNorm takes each strip by the statistics of the whole
frame, which a first pass over the strips gathers. So the result is that of whole frames up to rounding,
wherever the strips end.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import (
    Autoencoder,
    Decoder,
    DiagonalGaussian,
    Downsample,
    Encoder,
    ResidualBlock,
    Upsample,
    posterior_of,
)
from .layers import GroupNorm, StreamConv, stream_dtype

#: Of a strip, in the widest layer.
STRIP_ELEMENTS = 2**23

_Layer = Callable[[Tensor], Tensor]


def encode_in_strips(autoencoder: Autoencoder, x: Tensor, elements: int = STRIP_ELEMENTS) -> DiagonalGaussian:
    """Return the posterior of one frame [1, 3, H, W], as ``Autoencoder.encode`` does up to rounding."""
    x = x.to(stream_dtype(autoencoder.dtype), memory_format=torch.channels_last)
    return posterior_of(autoencoder.quant_conv(_through(autoencoder.encoder, x, elements)))


def decode_in_strips(autoencoder: Autoencoder, z: Tensor, elements: int = STRIP_ELEMENTS) -> Tensor:
    """Return one frame [1, 3, 8 h, 8 w] of latents [1, z, h, w], as ``Autoencoder.decode`` up to rounding."""
    z = autoencoder.post_quant_conv(z.to(autoencoder.dtype, memory_format=torch.channels_last))
    return _through(autoencoder.decoder, z.to(stream_dtype(autoencoder.dtype)), elements)


def _through(network: Encoder | Decoder, h: Tensor, elements: int) -> Tensor:
    for layer in _layers(network):
        if isinstance(layer, ResidualBlock):
            h = _residual(layer, h, elements)
        elif isinstance(layer, Downsample):
            h = _in_strips(layer, h, elements, above=0, below=1, down=2)
        elif isinstance(layer, (Upsample, StreamConv)):
            h = _in_strips(layer, h, elements, up=2 if isinstance(layer, Upsample) else 1)
        else:
            h = layer(h)  # attention, at the latents' resolution and to the whole frame
    norm = _Norm(network.norm_out, h, elements)
    return _in_strips(lambda rows: network.conv_out(norm(rows)), h, elements)


def _layers(network: Encoder | Decoder) -> Iterator[nn.Module]:
    middle = (network.mid.block_1, network.mid.attn_1, network.mid.block_2)
    levels: Any = network.down if isinstance(network, Encoder) else reversed(network.up)
    outer: list[nn.Module] = []
    for level in levels:
        outer += [layer for layer in (*level.block, level.downsample, level.upsample) if layer is not None]
    yield network.conv_in
    yield from [*outer, *middle] if isinstance(network, Encoder) else [*middle, *outer]


def _residual(block: ResidualBlock, x: Tensor, elements: int) -> Tensor:
    norm1 = _Norm(block.norm1, x, elements)
    begin = lambda rows: block.conv1(norm1(rows))  # noqa: E731
    norm2 = _Norm(block.norm2, x, elements, begin)
    return _in_strips(
        lambda rows: block.nin_shortcut(rows) + block.conv2(norm2(begin(rows))), x, elements, above=2, below=2
    )


def _in_strips(
    layer: _Layer, x: Tensor, elements: int, above: int = 1, below: int = 1, up: int = 1, down: int = 1
) -> Tensor:
    """Return ``layer(x)``, computed from strips with so many rows above and below them.

    It gives ``up`` rows for each row that it takes, or one for ``down`` of them.
    """
    result: Tensor | None = None
    for start, rows in _strips(layer, x, elements, above, below, up, down):
        if result is None:
            shape = (1, rows.shape[1], x.shape[2] * up // down, rows.shape[3])
            result = torch.empty(
                shape, dtype=rows.dtype, device=rows.device, memory_format=torch.channels_last
            )
        result[:, :, start : start + rows.shape[2]] = rows
    assert result is not None  # a frame has rows
    return result


def _strips(
    layer: _Layer, x: Tensor, elements: int, above: int = 1, below: int = 1, up: int = 1, down: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Yield strips of ``layer(x)``, each with its first row."""
    height = x.shape[2]
    count = max(elements // (x.shape[1] * x.shape[3] * up * up) // down * down, down)
    for start in range(0, height, count):
        end = min(start + count, height)
        first, last = max(start - above, 0), min(end + below, height)
        skip = (start - first) * up // down
        rows = layer(x[:, :, first:last])
        yield start * up // down, rows[:, :, skip : skip + (end - start) * up // down]


class _Norm:
    """A GroupNorm whose statistics are those of a whole frame, for its strips.

    Args:
        norm: the layer.
        x: the frame [1, c, h, w].
        elements: of a strip.
        before: what comes between the frame and the norm, with the rows around it.
    """

    def __init__(self, norm: GroupNorm, x: Tensor, elements: int, before: _Layer | None = None):
        self._norm = norm
        strips = _strips(before, x, elements) if before else _strips(lambda rows: rows, x, elements, 0, 0)
        count, mean, squares = 0, 0.0, 0.0
        for _, rows in strips:  # merged as in Chan et al. 1979, which does not cancel
            grouped = rows.float().unflatten(1, (norm.num_groups, -1))
            size = grouped[:, 0].numel()
            variance, its_mean = (
                each.double() for each in torch.var_mean(grouped, (0, 2, 3, 4), correction=0)
            )
            difference = its_mean - mean
            squares = squares + variance * size + difference**2 * (count * size / (count + size))
            mean = mean + difference * (size / (count + size))
            count += size
        each = norm.num_channels // norm.num_groups
        self._mean = torch.as_tensor(mean).float().repeat_interleave(each)
        self._variance = torch.as_tensor(squares / count).float().repeat_interleave(each)

    def __call__(self, rows: Tensor) -> Tensor:
        weight, bias = self._norm.weight.float(), self._norm.bias.float()
        y = F.batch_norm(rows.float(), self._mean, self._variance, weight, bias, eps=self._norm.eps)
        return (F.silu(y, inplace=True) if self._norm.silu else y).to(self._norm.weight.dtype)
