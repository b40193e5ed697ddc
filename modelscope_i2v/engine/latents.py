"""Between videos and the diffusion's latents, and the latents' random draws."""

from __future__ import annotations

from typing import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..media.preprocessing import to_frames
from ..models.autoencoder import SCALE_FACTOR, Autoencoder, DiagonalGaussian
from ..models.unet import UNetConfig
from .memory.out_of_memory import with_less_at_a_time

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
    autoencoder: Autoencoder, frames: Iterable[Tensor], size: tuple[int, int], latent: tuple[int, int]
) -> DiagonalGaussian:
    """Return the posterior [F, z, h, w] of frames, taken one by one: only latents are kept.

    Args:
        frames: [3, H, W] each, in [-1, 1], of any size.
        size: (width, height) in pixels to resize them to, bilinearly.
        latent: (h, w) of the result. Where it covers more than ``size``, the frames' edges are repeated.
    """
    device = autoencoder.quant_conv.weight.device
    (width, height), scale = size, autoencoder.config.downscale
    right, bottom = latent[1] * scale - width, latent[0] * scale - height
    means, logvars = [], []
    for frame in frames:
        frame = F.interpolate(frame[None].to(device), size=(height, width), mode="bilinear")
        frame = F.pad(frame, (0, right, 0, bottom), mode="replicate")
        posterior = autoencoder.encode(frame)
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
    return DiagonalGaussian(torch.cat(means), torch.cat(logvars))


def sample_latents(posterior: DiagonalGaussian, noise: Tensor) -> Tensor:
    """Return scaled latents [1, z, F, h, w], float32, of a posterior and normal noise [F, z, h, w]."""
    return SCALE_FACTOR * rearrange(posterior.sample(noise).float(), "f z h w -> 1 z f h w")


def decode_latents(
    autoencoder: Autoencoder,
    latents: Tensor,
    size: tuple[int, int],
    frames_at_a_time: int,
    to_uint8: bool = False,
) -> Tensor:
    """Return the videos of scaled latents [B, z, F, h, w], on the CPU.

    Args:
        size: (width, height) in pixels to which the decoded frames are cropped.
        frames_at_a_time: how many to decode together; fewer, if they do not fit into memory.
        to_uint8: whether the result is pictures, [B, F, H, W, 3] uint8, or what the autoencoder gives,
            [B, 3, F, H, W] float32 in about [-1, 1].

    Raises:
        OutOfMemory: if not even one frame fits.
    """
    width, height = size
    frames = rearrange(latents / SCALE_FACTOR, "b z f h w -> (b f) z h w")
    if to_uint8:
        video = torch.empty(len(frames), height, width, autoencoder.config.out_ch, dtype=torch.uint8)
    else:
        video = torch.empty(len(frames), autoencoder.config.out_ch, height, width)

    def decode(count: int) -> None:
        for start in range(0, len(frames), count):
            part = slice(start, start + count)
            decoded = autoencoder.decode(frames[part])[..., :height, :width].float().cpu()
            video[part] = torch.from_numpy(to_frames(decoded.transpose(0, 1))) if to_uint8 else decoded

    counts = [frames_at_a_time, *(count for count in _HALVES if count < frames_at_a_time)]
    with_less_at_a_time(decode, counts, "decoding {} frames at a time", latents.device)
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
