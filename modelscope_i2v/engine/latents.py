"""Between videos and the diffusion's latents, and the latents' random draws."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..models.autoencoder import SCALE_FACTOR, Autoencoder
from ..models.unet import UNetConfig
from .memory.out_of_memory import with_less_at_a_time

#: Of frames decoded at a time, when memory runs out.
_HALVES = [2**power for power in range(11, -1, -1)]


def latent_size(size: tuple[int, int], unet: UNetConfig, scale: int) -> tuple[int, int]:
    """(height, width) of the latent for a video of ``size`` (width, height) pixels.

    It is the smallest that covers the video and that the UNet takes as it is: the surplus is generated
    with the rest, as in-frame content, and cropped off the decoded frames.
    """
    width, height = (-(-length // scale) for length in size)
    return unet.padded_size(height, width)


def encode_video(
    autoencoder: Autoencoder, frames: Tensor, size: tuple[int, int], latent: tuple[int, int], noise: Tensor
) -> Tensor:
    """The latent [1, z, F, h, w] of frames, resized and, where the latent covers more, padded by their edges.

    Args:
        frames: [F, 3, H, W] in [-1, 1], of any size.
        size: (width, height) in pixels to resize them to, bilinearly.
        latent: (h, w) of the result.
        noise: the posterior's, [F, z, h, w].
    """
    weight = autoencoder.quant_conv.weight
    (width, height), scale = size, autoencoder.config.downscale
    right, bottom = latent[1] * scale - width, latent[0] * scale - height
    encoded = []
    # One frame at a time: at 720p it already fills the device.
    for frame, frame_noise in zip(frames.split(1), noise.split(1)):
        frame = F.interpolate(frame.to(weight.device), size=(height, width), mode="bilinear")
        frame = F.pad(frame, (0, right, 0, bottom), mode="replicate")
        encoded.append(autoencoder.encode(frame).sample(frame_noise).float())
    return SCALE_FACTOR * rearrange(torch.cat(encoded), "f z h w -> 1 z f h w")


def decode_video(autoencoder: Autoencoder, latents: Tensor, size: tuple[int, int], chunk: int) -> Tensor:
    """The video [B, 3, F, H, W] of latents [B, z, F, h, w], float32 on the CPU, about [-1, 1].

    Args:
        size: (width, height) in pixels to which the decoded frames are cropped.
        chunk: frames decoded at a time; fewer, if they do not fit into memory.

    Raises:
        OutOfMemory: if not even one does.
    """
    width, height = size
    frames = rearrange(latents / SCALE_FACTOR, "b z f h w -> (b f) z h w")
    video = torch.empty(len(frames), autoencoder.config.out_ch, height, width)

    def decode(count: int) -> None:
        for start in range(0, len(frames), count):
            part = slice(start, start + count)
            video[part] = autoencoder.decode(frames[part])[..., :height, :width].float()

    counts = [chunk, *(count for count in _HALVES if count < chunk)]
    with_less_at_a_time(decode, counts, "decoding {} frames at a time", latents.device)
    return rearrange(video, "(b f) c h w -> b c f h w", b=latents.shape[0])


def draw_noise(generator: torch.Generator, shape: tuple[int, ...], offset_strength: float = 0.0) -> Tensor:
    """Normal noise [1, z, F, h, w] from a CPU generator, so that every device computes the same video.

    ``offset_strength`` adds that much of a second draw, which is the same for all positions of a frame's
    channel (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    noise = torch.randn(shape, generator=generator)
    if offset_strength:
        noise = noise + offset_strength * torch.randn((*shape[:3], 1, 1), generator=generator)
    return noise
