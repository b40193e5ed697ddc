"""How much memory a generation takes, about, told from its settings and sizes before anything is begun."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ...models.autoencoder import Autoencoder
from ...models.clip import ClipImageEncoder, ClipTextEncoder
from ...models.transformers import EXPANSION
from ...models.unet import UNet
from ...settings.stages import StageSettings

logger = logging.getLogger(__name__)

_WEIGHT_BYTES = {"auto": 2, "fp32": 4, "fp16": 2, "bf16": 2}
_ACTIVATION_BYTES = {**_WEIGHT_BYTES, "bf16": 4}  # counted: the residual stream is float32 beside bf16

# Counted, by following every tensor of a call, on the published networks in half precision. In units of the
# latent's positions x the width of the UNet's finest level, the branches of guidance take 9.1 where they are
# computed one after the other, and 18.1 where they are computed together (as stage one's are).
_UNET_APART, _UNET_TOGETHER = 9.1, 18.1
#: At least this, and so many times the largest tensor inside a layer, where that is taken in chunks.
_UNET_LAYER, _UNET_CHUNKS = 5.0, 2.0
_AUTOENCODER_ELEMENTS = 8.2  # a pixel and unit of width: 1.8 GiB for one frame of 1280x720
_STRIPS_ELEMENTS = 3.1  # the same of one frame in strips
# Frames in float32, of 12 bytes a pixel: those going in, those coming out, and a copy of these while they are
# scaled. They lie in the host's memory, wherever the networks are.
_FRAME_BYTES = 3 * 12


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: of the networks' weights, of the largest thing that is computed at a time, of all frames."""

    weights: int
    activations: int
    frames: int

    @property
    def networks(self) -> int:
        """What a GPU needs; on the CPU the frames come on top."""
        return self.weights + self.activations


def chunk_of(device: torch.device, low_memory: bool) -> int:
    """How many elements the largest tensor inside the UNet's layers may have, in general.

    Large enough to keep the device busy. Less only saves more: out of memory, less is tried.
    """
    if device.type != "cuda":
        return CPU_CHUNK
    return GPU_CHUNK // 4 if low_memory else GPU_CHUNK


#: 256 MiB in half precision: in stage two five frames of the finest level through a transformer, eight
#: through a residual block.
GPU_CHUNK = 2**27
#: What stays in a CPU's cache between a feed-forward's layers: 2 to 5 % faster, as measured, than all.
CPU_CHUNK = 2**22


def estimate_memory(
    settings: StageSettings,
    size: tuple[int, int],
    frames: int,
    window: int,
    low_memory: bool = False,
    tile: int | None = None,
) -> MemoryEstimate:
    """Of one generation.

    Args:
        settings: with ``precision`` ``auto`` taken as half precision.
        size: (width, height) in pixels.
        frames: of the whole video.
        window: frames that go through the UNet at a time.
        low_memory: whether the networks take turns, so that one's weights count and not all's.
        tile: side in pixels of the tiles that go through the UNet at a time, instead of whole frames. The
            autoencoder then takes one frame in strips.
    """
    pixels = size[0] * size[1]
    of_tile = pixels if tile is None else min(tile, size[0]) * min(tile, size[1])
    positions = min(window, frames) * of_tile / settings.autoencoder.downscale**2
    with torch.device("meta"):  # nothing is allocated
        unet, autoencoder = UNet(settings.unet), Autoencoder(settings.autoencoder)
        tower = ClipImageEncoder if settings.unet.image_conditioned else ClipTextEncoder
        networks = unet, autoencoder, tower(settings.clip).model
    of_weights = [_parameters(each) * _WEIGHT_BYTES[settings.precision] for each in networks]
    width = settings.unet.dim * settings.unet.dim_mult[0]
    finest = positions * width
    parts = min(chunk_of(torch.device("cuda"), low_memory), EXPANSION * finest)
    outside = _UNET_TOGETHER if settings.unet.image_conditioned else _UNET_APART
    in_unet = max(outside * finest, _UNET_LAYER * finest + _UNET_CHUNKS * parts)
    decoded = (1 if low_memory else min(settings.decoder_bs, frames)) * pixels
    in_autoencoder = decoded * settings.autoencoder.ch * _AUTOENCODER_ELEMENTS
    if tile is not None:
        in_autoencoder = pixels * settings.autoencoder.ch * _STRIPS_ELEMENTS
    inside = [int(each * _ACTIVATION_BYTES[settings.precision]) for each in (in_unet, in_autoencoder, 0)]
    if low_memory:  # which network needs the most, with what it computes
        weights, activations = max(zip(of_weights, inside), key=sum)
    else:
        weights, activations = sum(of_weights), max(inside)
    return MemoryEstimate(weights, activations, frames=frames * pixels * _FRAME_BYTES)


def memory_in_words(settings: StageSettings, size: tuple[int, int], frames: int, window: int) -> str:
    """The estimate as a clause for messages."""
    estimate = estimate_memory(settings, size, frames, window)
    half = "half precision (twice that in fp32)"
    precision = half if settings.precision == "auto" else settings.precision
    at_a_time = f", {window:,} at a time," if window < frames else ""
    return (
        f"{size[0]}x{size[1]} and {frames:,} frames{at_a_time} take about {in_gigabytes(estimate.networks)} "
        f"for the networks in {precision} and {in_gigabytes(estimate.frames)} for the frames"
    )


def choose_low_memory(settings: StageSettings, device: torch.device) -> bool:
    """Return whether networks take turns on the device: as set, or with ``auto`` if all do not fit."""
    if settings.low_memory != "auto":
        return bool(settings.low_memory)
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    frames = settings.max_frames
    needed = estimate_memory(settings, settings.frame_size, frames, frames).networks
    if needed > free:
        logger.warning(
            "%s: low-memory mode: keeping all networks on %s needs about %s, and %s are free",
            settings.stage, device, in_gigabytes(needed), in_gigabytes(free),
        )  # fmt: skip
    return needed > free


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def in_gigabytes(count: int) -> str:
    """A number of bytes, in words."""
    gigabytes = count / 2**30
    return f"{gigabytes:,.0f} GiB" if gigabytes >= 10 else f"{max(gigabytes, 0.1):.1f} GiB"
