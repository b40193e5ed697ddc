"""What is measured: the sizes of the networks and of the latents, and the inputs that both sides get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modelscope_i2v.settings.configuration import StageSettings

STAGE_NAMES = {1: "image-to-video", 2: "video-to-video"}
PUBLISHED_STEPS = {1: 50, 2: 30}


@dataclass(frozen=True)
class Size:
    """Architectures, as in a ``configuration.json`` (empty: the published ones), and videos, by stage."""

    name: str
    latents: dict[int, tuple[int, int, int]]  # frames, height, width
    steps: dict[int, int]  # of a whole stage
    unet: dict[str, Any] = field(default_factory=dict)
    autoencoder: dict[str, Any] = field(default_factory=dict)
    clip: dict[str, Any] = field(default_factory=dict)


#: The stock UNets take no other: it is written out in their decoders.
_CONTEXT = 1024


def _clip(width: int, layers: int, patch: int) -> dict[str, Any]:
    return {
        "embed_dim": _CONTEXT,
        "vision_cfg": {
            "image_size": 224, "layers": layers, "width": width, "head_width": 32, "patch_size": patch,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": _CONTEXT, "heads": 16, "layers": layers,
        },
    }  # fmt: skip


TINY = Size(
    name="tiny",
    latents={1: (2, 8, 8), 2: (2, 10, 8)},
    steps={1: 2, 2: 2},
    unet={
        "dim": 32, "dim_mult": [1, 2, 2, 2], "num_heads": 4, "head_dim": 16,
        "num_res_blocks": 1,
    },
    autoencoder={"ddconfig": {"ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1}, "embed_dim": 4},
    clip=_clip(64, layers=2, patch=32),
)  # fmt: skip
SMALL = Size(
    name="small",
    latents={1: (8, 8, 16), 2: (8, 10, 16)},
    steps={1: 2, 2: 2},
    unet={"dim": 128, "num_heads": 3, "head_dim": 64},
    autoencoder={"ddconfig": {"ch": 64, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}, "embed_dim": 4},
    clip=_clip(256, layers=4, patch=16),
)
FULL_ON_CPU = Size("full", latents={1: (8, 16, 24), 2: (8, 18, 24)}, steps={1: 2, 2: 2})
FULL_ON_GPU = Size("full", latents={1: (32, 32, 56), 2: (32, 90, 160)}, steps=PUBLISHED_STEPS)

SIZE_NAMES = ("tiny", "small", "full")


def size_named(name: str, device: torch.device) -> Size:
    """One of ``SIZE_NAMES``: full is the published size on a GPU, and full widths on less video on a CPU."""
    if name == "full":
        return FULL_ON_GPU if device.type == "cuda" else FULL_ON_CPU
    return {"tiny": TINY, "small": SMALL}[name]


@dataclass(frozen=True)
class Case:
    """The inputs of one stage, the same for both sides, float32 on the CPU.

    ``noise`` and ``latents`` are [1, 4, F, h, w]; ``image`` is [1, 3, 224, 224]; ``frames`` are
    [F, 3, H / 2, W / 2] in [-1, 1], their ``posterior_noise`` [F, 4, h, w]; ``y`` and ``negative_y`` are the
    UNet's conditioning: stage one's an image embedding [1, 1, D] and zeros, stage two's [1, 77, D].
    """

    stage: int
    settings: StageSettings
    noise: Tensor
    latents: Tensor
    image: Tensor
    frames: Tensor
    posterior_noise: Tensor
    y: Tensor
    negative_y: Tensor

    @property
    def pixels(self) -> tuple[int, int]:
        """(width, height) of the video."""
        return self.settings.frame_size


def draw_case(stage: int, settings: StageSettings, seed: int = 0) -> Case:
    """The inputs of a stage with these settings."""
    seeded = torch.Generator().manual_seed(seed)
    frames, height, width = settings.max_frames, settings.latent_hei, settings.latent_wid
    shape = (1, settings.autoencoder.embed_dim, frames, height, width)
    pixels = settings.frame_size
    tokens = 1 if stage == 1 else 77
    y = torch.randn(1, tokens, settings.unet.y_dim, generator=seeded)
    negative_y = torch.zeros_like(y) if stage == 1 else torch.randn(y.shape, generator=seeded)
    return Case(
        stage=stage,
        settings=settings,
        noise=torch.randn(shape, generator=seeded),
        latents=torch.randn(shape, generator=seeded),
        image=torch.randn(1, 3, settings.clip.image_size, settings.clip.image_size, generator=seeded),
        frames=torch.rand(frames, 3, pixels[1] // 2, pixels[0] // 2, generator=seeded) * 2 - 1,
        posterior_noise=torch.randn(frames, shape[1], height, width, generator=seeded),
        y=y,
        negative_y=negative_y,
    )
