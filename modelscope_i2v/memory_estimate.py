"""How much memory a generation takes, about, told from its settings and sizes before anything is begun."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .configuration import StageSettings
from .models.autoencoder import Autoencoder
from .models.clip import ClipImageEncoder, ClipTextEncoder
from .models.unet import UNet

_ELEMENT_BYTES = {"auto": 2, "fp32": 4, "fp16": 2, "bf16": 2}

# Fitted to the published networks in half precision, without any saving of memory. One call of the UNet takes
# 1.9 GiB for a latent of 32 x 32 x 56 and 8.6 GiB for one of 32 x 90 x 160: a part that grows with the
# latent's positions (and the width of the UNet's finest level), and one that does not.
_UNET_ELEMENTS = 27.86  # a position and unit of width
_UNET_WORKSPACE = 0.36  # of the UNet's weights
_AUTOENCODER_ELEMENTS = 8.2  # a pixel and unit of width: 1.8 GiB for one frame of 1280x720
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


def estimate_memory(
    settings: StageSettings, size: tuple[int, int], frames: int, window: int
) -> MemoryEstimate:
    """Of one generation.

    Args:
        settings: with ``precision`` ``auto`` taken as half precision.
        size: (width, height) in pixels.
        frames: of the whole video.
        window: frames that go through the UNet at a time.
    """
    element = _ELEMENT_BYTES[settings.precision]
    pixels = size[0] * size[1]
    positions = min(window, frames) * pixels / settings.autoencoder.downscale**2
    with torch.device("meta"):  # nothing is allocated
        unet, autoencoder = UNet(settings.unet), Autoencoder(settings.autoencoder)
        tower = ClipImageEncoder if settings.unet.image_conditioned else ClipTextEncoder
        parameters = [_parameters(part) for part in (unet, autoencoder, tower(settings.clip).model)]
    width = settings.unet.dim * settings.unet.dim_mult[0]
    in_unet = positions * width * _UNET_ELEMENTS + parameters[0] * _UNET_WORKSPACE
    decoded = min(settings.decoder_bs, frames) * pixels
    in_autoencoder = decoded * settings.autoencoder.ch * _AUTOENCODER_ELEMENTS
    return MemoryEstimate(
        weights=sum(parameters) * element,
        activations=int(max(in_unet, in_autoencoder) * element),
        frames=frames * pixels * _FRAME_BYTES,
    )


def memory_in_words(settings: StageSettings, size: tuple[int, int], frames: int, window: int) -> str:
    """The estimate as a clause for messages."""
    estimate = estimate_memory(settings, size, frames, window)
    half = "half precision (twice that in fp32)"
    precision = half if settings.precision == "auto" else settings.precision
    at_a_time = f", {window:,} at a time," if window < frames else ""
    return (
        f"{size[0]}x{size[1]} and {frames:,} frames{at_a_time} take about {_gigabytes(estimate.networks)} "
        f"for the networks in {precision} and {_gigabytes(estimate.frames)} for the frames"
    )


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _gigabytes(count: int) -> str:
    gigabytes = count / 2**30
    return f"{gigabytes:,.0f} GiB" if gigabytes >= 10 else f"{max(gigabytes, 0.1):.1f} GiB"
