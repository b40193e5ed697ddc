"""GroupNorm, with SiLU if wanted, over channels-last memory on a GPU: three small Triton kernels.

PyTorch's own kernel gives each group of each sample one block of threads, so that the temporal norms, whose
one sample is the whole video, keep 32 blocks busy on a GPU with 132 multiprocessors. Here as many programs as
the GPU holds at once share the rows, and SiLU costs no pass over memory of its own.

In channels-last memory a sample n c h w is R = h w rows of C channels. The steps, with float32 inside:

1. every program takes the mean of some rows, and the sum of squared deviations from it, for each channel;
2. those of a group are combined, and with weight and bias give each channel of each sample a scale and a
   shift;
3. y = x scale + shift, then SiLU.

Means and squared deviations are never had from sums of x and x^2, which would cancel where the mean is large:
single values are added by Welford's update, and partial results by Chan, Golub and LeVeque's formula
("Updating formulae and a pairwise algorithm for computing sample variances", 1979).

For inference: no gradient passes. Triton is optional; without it this module can be imported and ``supports``
is false.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not every platform has it
    triton = None

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: 64 channels of half precision are one cache line of 128 bytes; published widths are multiples of 64.
BLOCK_C = 64
#: Rows of a tile. Statistics keep two float32 tiles in registers, 16 elements of each a thread...
STATISTICS_ROWS = 32
#: ...while applying needs none between tiles, and keeps more loads in flight with 32 elements a thread.
APPLY_ROWS = 64
#: Few warps for a program, so that a multiprocessor holds many: one's loads hide another's arithmetic.
#: Multiply-adds are fused by default up to Triton 3.9 only; asked for, they are by later ones too.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
#: Programs for the statistics. A multiprocessor holds about this many at 64 registers a thread: more would
#: only queue, and leave more to combine.
PROGRAMS_A_MULTIPROCESSOR = 8
#: Below this, a program's share is done before it pays for its start and its part in combining.
FEWEST_TILES_A_PROGRAM = 2
#: Partial statistics that a program of step 2 takes at once, 32 a thread: all that one of 32 groups has on an
#: H200. It does not follow the video's size, so that no new size is compiled for.
COMBINED_AT_ONCE = 4096

#: Numbers that follow the video's size. Compiling for their particular values (1, multiples of 16) would only
#: compile more often; that the number of channels is a multiple of 16 does matter, for 16-byte loads.
_UNSPECIALIZED = ("rows", "block_rows", "row_blocks", "width")


def _kernel(function):
    """As a decorator: compiles a function with Triton, where there is Triton."""
    return triton.jit(function, do_not_specialize=_UNSPECIALIZED) if triton else function


@_kernel
def _partial_statistics(
    x_ptr, partial_ptr, rows, channels, block_rows, row_blocks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """x [N, R, C] -> partial [N, row_blocks, 2, C]: mean and sum of squared deviations, float32.

    A program for each 64 channels of each block of rows. Programs of neighbouring channels are numbered one
    after the other: running side by side, they read whole rows.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    column = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    block = (program // channel_blocks).to(tl.int64)  # of all samples; offsets may pass 2^31
    first = (block % row_blocks) * block_rows
    count = tl.minimum(rows - first, block_rows).to(tl.int32)

    x_ptr += (block // row_blocks * rows + first) * channels
    offsets = row[:, None] * channels + column[None, :]
    # Welford's update, for each element of the tile on its own: nothing crosses threads until the end.
    means = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    seen = 0.0
    for start in range(0, count, BLOCK_R):
        mask = (start + row < count)[:, None] & (column < channels)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        seen += 1.0
        delta = tl.where(mask, x - means, 0.0)
        means += delta * (1.0 / seen)
        squares += delta * (x - means)
        x_ptr += BLOCK_R * channels

    # Chan's formula, over the rows of the tile: how many values each has seen differs by one at most.
    counts = ((count - row + BLOCK_R - 1) // BLOCK_R).to(tl.float32)[:, None]
    mean = tl.sum(counts * means, axis=0) / count
    spread = means - mean[None, :]
    squares_sum = tl.sum(squares + counts * spread * spread, axis=0)
    partial_ptr += block * 2 * channels
    tl.store(partial_ptr + column, mean, mask=column < channels)
    tl.store(partial_ptr + channels + column, squares_sum, mask=column < channels)


@_kernel
def _scale_and_shift(
    partial_ptr, weight_ptr, bias_ptr, affine_ptr, rows, channels, block_rows, row_blocks, width, eps,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """partial [N, row_blocks, 2, C], weight [C], bias [C] -> affine [N, 2, C]: scale and shift, float32.

    A program for each group of each sample, of ``width`` channels; WIDTH is the power of two from there up.
    """
    groups = channels // width
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    offset = tl.arange(0, WIDTH)
    within = offset < width
    column = (program % groups) * width + offset
    block = tl.arange(0, BLOCKS)
    partial_ptr += sample * row_blocks * 2 * channels

    # Chan's formula, in two passes of which the second reads what the first left in the cache.
    sums = tl.zeros([BLOCKS, WIDTH], tl.float32)
    for start in range(0, row_blocks, BLOCKS):
        index = start + block
        mask = (index < row_blocks)[:, None] & within[None, :]
        pointers = partial_ptr + index[:, None] * 2 * channels + column[None, :]
        counts = tl.minimum(rows - index * block_rows, block_rows).to(tl.float32)[:, None]
        means = tl.load(pointers, mask=mask, other=0.0)
        sums += tl.where(mask, counts * means, 0.0)
    size = rows.to(tl.float32) * width
    mean = tl.sum(tl.sum(sums, axis=1), axis=0) / size

    sums = tl.zeros([BLOCKS, WIDTH], tl.float32)
    for start in range(0, row_blocks, BLOCKS):
        index = start + block
        mask = (index < row_blocks)[:, None] & within[None, :]
        pointers = partial_ptr + index[:, None] * 2 * channels + column[None, :]
        counts = tl.minimum(rows - index * block_rows, block_rows).to(tl.float32)[:, None]
        spread = tl.load(pointers, mask=mask, other=0.0) - mean
        squares = tl.load(pointers + channels, mask=mask, other=0.0)
        sums += tl.where(mask, squares + counts * spread * spread, 0.0)
    variance = tl.sum(tl.sum(sums, axis=1), axis=0) / size

    weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=within, other=0.0).to(tl.float32)
    scale = weight / tl.sqrt(variance + eps)
    affine_ptr += sample * 2 * channels
    tl.store(affine_ptr + column, scale, mask=within)
    tl.store(affine_ptr + channels + column, bias - mean * scale, mask=within)


@_kernel
def _apply(
    x_ptr, affine_ptr, y_ptr, rows, channels, SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """x [N, R, C], affine [N, 2, C] -> y [N, R, C]. A program for each tile, channels numbered first."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row_blocks = tl.cdiv(rows, BLOCK_R)
    program = tl.program_id(0)
    column = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    block = (program // channel_blocks).to(tl.int64)
    sample = block // row_blocks
    first = block % row_blocks * BLOCK_R

    affine_ptr += sample * 2 * channels
    scale = tl.load(affine_ptr + column, mask=column < channels, other=0.0)
    shift = tl.load(affine_ptr + channels + column, mask=column < channels, other=0.0)
    start = (sample * rows + first) * channels
    offsets = row[:, None] * channels + column[None, :]
    mask = (first + row < rows)[:, None] & (column < channels)[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * scale[None, :] + shift[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def supports(x: Tensor) -> bool:
    """Whether ``group_norm_silu`` can take x: n c h w in channels-last memory, on a GPU, without gradients.

    Asked for on every call, so it is cheap; only the first of a device and dtype runs the kernels once.
    """
    return (
        triton is not None
        and x.is_cuda
        and x.ndim == 4
        and x.dtype in DTYPES
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_grad_enabled()
        and _works(x.device, x.dtype)
    )


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """``F.group_norm``, then ``F.silu`` if wanted, computed in float32 and rounded once.

    Nothing here waits for the GPU. Only ``supports`` checks x.

    Args:
        x: [N, C, *spatial], with the channels of each position side by side in memory; not changed.
        groups: of the channels; divides C.
        weight, bias: [C], contiguous, in any floating-point dtype.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        y [N, C, *spatial], in weight's dtype and x's memory layout.
    """
    samples, channels = x.shape[:2]
    rows = x.numel() // (samples * channels)
    width = channels // groups
    channel_blocks = -(-channels // BLOCK_C)
    block_rows = _block_rows(rows, samples * channel_blocks, _multiprocessors(x.device))
    row_blocks = -(-rows // block_rows)
    padded_width = triton.next_power_of_2(width)
    combined = max(COMBINED_AT_ONCE // padded_width, 1)

    partial = torch.empty((samples, row_blocks, 2, channels), dtype=torch.float32, device=x.device)
    affine = torch.empty((samples, 2, channels), dtype=torch.float32, device=x.device)
    y = torch.empty_like(x, dtype=weight.dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _partial_statistics[(samples * row_blocks * channel_blocks,)](
            x, partial, rows, channels, block_rows, row_blocks, STATISTICS_ROWS, BLOCK_C, **OPTIONS
        )
        _scale_and_shift[(samples * groups,)](
            partial, weight, bias, affine, rows, channels, block_rows, row_blocks, width, eps,
            combined, padded_width, **OPTIONS
        )  # fmt: skip
        _apply[(samples * -(-rows // APPLY_ROWS) * channel_blocks,)](
            x, affine, y, rows, channels, silu, APPLY_ROWS, BLOCK_C, **OPTIONS
        )
    return y


def _block_rows(rows: int, programs: int, multiprocessors: int) -> int:
    """How many rows a program takes the statistics of: whole tiles, but for the last program's.

    Args:
        rows: of a sample.
        programs: how many there would be if each took all rows of its sample.
        multiprocessors: of the GPU.
    """
    row_blocks = max(PROGRAMS_A_MULTIPROCESSOR * multiprocessors // programs, 1)
    tiles = -(-rows // (row_blocks * STATISTICS_ROWS))
    return max(tiles, FEWEST_TILES_A_PROGRAM) * STATISTICS_ROWS


@functools.lru_cache(maxsize=None)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter, for tests: any small number
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=None)
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile and start: a GPU may be too old, a host without what Triton needs."""
    x = torch.zeros((1, 320, 1, 1), dtype=dtype, device=device)  # compiled so, it is what the UNet needs
    try:
        group_norm_silu(x, 32, x.flatten(), x.flatten(), eps=1.0, silu=True)
    except torch.cuda.OutOfMemoryError:  # tells nothing about the kernels
        raise
    except Exception as error:  # whatever a compiler, its linker and a driver may raise
        logger.warning("GroupNorm runs as PyTorch's own on %s: Triton failed with %r", device, error)
        return False
    return True
