"""Between videos and the diffusion's latents, and the latents' random draws."""

from __future__ import annotations

import logging
from typing import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..media.preprocessing import to_frames
from ..models.autoencoder import SCALE_FACTOR, Autoencoder, DiagonalGaussian
from ..models.strips import decode_in_strips, encode_in_strips
from ..models.unet import UNetConfig
from .colours import with_low_frequencies
from .memory.out_of_memory import OutOfMemory, with_less_at_a_time

logger = logging.getLogger(__name__)

#: Fewer frames to decode at a time, when memory runs out.
_HALVES = [2**power for power in range(11, -1, -1)]


def latent_size(size: tuple[int, int], unet: UNetConfig, scale: int) -> tuple[int, int]:
    """Return (height, width) of the latent for a video of ``size`` (width, height) pixels.

    It is the smallest that covers the video and that the UNet takes as it is: the surplus is generated
    with the rest, as in-frame content, and cropped off the decoded frames.
    """
    width, height = (-(-length // scale) for length in size)
    return unet.padded_size(height, width)


def encode_frames(
    autoencoder: Autoencoder,
    frames: Iterable[Tensor],
    size: tuple[int, int],
    latent: tuple[int, int],
    in_strips: bool = False,
    seen: Callable[[Tensor], None] | None = None,
) -> DiagonalGaussian:
    """Return the posterior [F, z, h, w] of frames, taken one by one: only latents are kept.

    Args:
        frames: [3, H, W] each, in [-1, 1], of any size.
        size: (width, height) in pixels to resize them to, bilinearly.
        latent: (h, w) of the result. Where it covers more than ``size``, the frames' edges are repeated.
        in_strips: whether to take strips of a frame, as is done when it does not fit into memory.
        seen: called with each resized frame, [1, 3, height, width].

    Raises:
        OutOfMemory: if not even a frame in strips fits.
    """
    device = autoencoder.quant_conv.weight.device
    (width, height), scale = size, autoencoder.config.downscale
    right, bottom = latent[1] * scale - width, latent[0] * scale - height
    means, logvars = [], []
    for frame in frames:
        frame = F.interpolate(frame[None].to(device), size=(height, width), mode="bilinear")
        if seen is not None:
            seen(frame)
        frame = F.pad(frame, (0, right, 0, bottom), mode="replicate")
        posterior, in_strips = _encode(autoencoder, frame, in_strips)
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
    return DiagonalGaussian(torch.cat(means), torch.cat(logvars))


def _encode(autoencoder: Autoencoder, frame: Tensor, in_strips: bool) -> tuple[DiagonalGaussian, bool]:
    """Return a frame's posterior, and whether it took strips to fit into memory."""

    def encode(whole: int) -> tuple[DiagonalGaussian, bool]:
        return (autoencoder.encode(frame) if whole else encode_in_strips(autoencoder, frame)), not whole

    return with_less_at_a_time(encode, [0] if in_strips else [1, 0], "encoding in strips", frame.device)


def sample_latents(posterior: DiagonalGaussian, noise: Tensor) -> Tensor:
    """Return scaled latents [1, z, F, h, w], float32, of a posterior and normal noise [F, z, h, w]."""
    return SCALE_FACTOR * rearrange(posterior.sample(noise).float(), "f z h w -> 1 z f h w")


def decode_latents(
    autoencoder: Autoencoder,
    latents: Tensor,
    size: tuple[int, int],
    frames_at_a_time: int,
    to_uint8: bool = False,
    in_strips: bool = False,
    colours: Tensor | None = None,
    deep: bool = False,
) -> Tensor:
    """Return the videos of scaled latents [B, z, F, h, w], on the CPU.

    Args:
        size: (width, height) in pixels to which the decoded frames are cropped.
        frames_at_a_time: how many to decode together; fewer, if they do not fit into memory.
        to_uint8: whether the result is pictures, [B, F, H, W, 3] uint8, or what the autoencoder gives,
            [B, 3, F, H, W] float32 in about [-1, 1].
        in_strips: whether to take strips of a frame, as is done when it does not fit into memory.
        colours: low frequencies [F, 3, ..] that the frames shall have, of ``low_frequencies``; B is then 1.
        deep: whether pictures are of 16 bits, as int32.

    Raises:
        OutOfMemory: if not even a frame in strips fits.
    """
    width, height = size
    frames = rearrange(latents / SCALE_FACTOR, "b z f h w -> (b f) z h w")
    if to_uint8:
        pictures, dtype = (np.int32, torch.int32) if deep else (np.uint8, torch.uint8)
        video = torch.empty(len(frames), height, width, autoencoder.config.out_ch, dtype=dtype)
    else:
        video = torch.empty(len(frames), autoencoder.config.out_ch, height, width)

    def decode(count: int) -> None:
        for start in range(0, len(frames), count or 1):
            part = slice(start, start + (count or 1))
            z = frames[part]
            decoded = autoencoder.decode(z) if count else decode_in_strips(autoencoder, z)
            decoded = decoded[..., :height, :width]
            if colours is not None:
                decoded = with_low_frequencies(decoded, colours[part])
            decoded = decoded.float().cpu()
            if to_uint8:
                video[part] = torch.from_numpy(to_frames(decoded.transpose(0, 1), deep).astype(pictures))
            else:
                video[part] = decoded

    counts = [0] if in_strips else [frames_at_a_time, *(each for each in _HALVES if each < frames_at_a_time)]
    try:
        with_less_at_a_time(decode, counts, "decoding {} frames at a time", latents.device)
    except OutOfMemory:
        if in_strips:
            raise
        logger.warning("out of memory on %s: trying again, decoding a frame in strips", latents.device)
        with_less_at_a_time(decode, [0], "", latents.device)
    pattern = "(b f) h w c -> b f h w c" if to_uint8 else "(b f) c h w -> b c f h w"
    return rearrange(video, pattern, b=latents.shape[0])


def draw_noise(generator: torch.Generator, shape: tuple[int, ...], offset_strength: float = 0.0) -> Tensor:
    """Draw normal noise [1, z, F, h, w] from a CPU generator, so that every device computes the same video.

    ``offset_strength`` adds that much of a second draw, which is the same for all positions of a frame's
    channel (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    noise = torch.randn(shape, generator=generator)
    if offset_strength:
        noise = noise + offset_strength * torch.randn((*shape[:3], 1, 1), generator=generator)
    return noise
