"""What is measured: the sizes of networks and videos, a folder of random weights, and both sides' inputs."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from make_small_model import random_state_dict
from torch import Tensor, nn

from modelscope_i2v.models.autoencoder import Autoencoder
from modelscope_i2v.models.clip import build_clip
from modelscope_i2v.models.unet import UNet
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.settings.stages import StageSettings

TASKS = {1: "image-to-video", 2: "video-to-video"}
PUBLISHED_STEPS = {1: 50, 2: 30}

_CONTEXT = 1024  # the stock UNets take no other: it is written out in their decoders
#: The published autoencoder's file holds this many times the autoencoder: all of Stable Diffusion.
_RATIO = 15.6
_FILLER = 2**26  # elements of one tensor of what else that file holds
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Size:
    """Architectures, as in a ``configuration.json`` (empty: the published ones), and videos, by stage."""

    name: str
    latents: dict[int, tuple[int, int, int]]  # frames, height, width
    steps: dict[int, int]  # of a whole stage
    architectures: dict[str, Any] = field(default_factory=dict)


def _architectures(unet: dict, ch: int, ch_mult: list[int], blocks: int, clip: tuple[int, int, int]) -> dict:
    width, layers, patch = clip
    vision = {"image_size": 224, "layers": layers, "width": width, "head_width": 32, "patch_size": patch}
    text = {"context_length": 77, "vocab_size": 49408, "width": _CONTEXT, "heads": 16, "layers": layers}
    ddconfig = {"ch": ch, "ch_mult": ch_mult, "num_res_blocks": blocks}
    model_cfg = {"embed_dim": _CONTEXT, "vision_cfg": vision, "text_cfg": text}
    return {
        "UNet": unet,
        "auto_encoder": {"ddconfig": ddconfig, "embed_dim": 4},
        "embedder": {"model_cfg": model_cfg},
    }


_TINY_UNET = {"dim": 32, "dim_mult": [1, 2, 2, 2], "num_heads": 4, "head_dim": 16, "num_res_blocks": 1}
_SMALL_UNET = {"dim": 128, "num_heads": 3, "head_dim": 64}
SIZES = {
    "tiny": Size(
        "tiny", {1: (2, 8, 8), 2: (2, 10, 8)}, {1: 2, 2: 2},
        _architectures(_TINY_UNET, 32, [1, 1, 2, 2], 1, (64, 2, 32)),
    ),
    "small": Size(
        "small", {1: (8, 8, 16), 2: (8, 10, 16)}, {1: 2, 2: 2},
        _architectures(_SMALL_UNET, 64, [1, 2, 4, 4], 2, (256, 4, 16)),
    ),
    "full": Size("full", {1: (8, 16, 24), 2: (8, 18, 24)}, {1: 2, 2: 2}),
}  # fmt: skip
_FULL_ON_GPU = Size("full", {1: (32, 32, 56), 2: (32, 90, 160)}, PUBLISHED_STEPS)


def size_named(name: str, device: torch.device) -> Size:
    """One of ``SIZES``: full is the published size on a GPU, and full widths on less video on a CPU."""
    return _FULL_ON_GPU if (name, device.type) == ("full", "cuda") else SIZES[name]


def write_configuration(folder: Path, size: Size) -> None:
    """Write the ``configuration.json`` of both stages in one folder."""
    sections = {}
    for stage, task in TASKS.items():
        frames, height, width = size.latents[stage]
        video = {"seed": 0, "max_frames": frames, "latent_hei": height, "latent_wid": width}
        model_cfg = {**video, **size.architectures}
        sections[stage] = {"type": f"{task}-model", "model_args": {}, "model_cfg": model_cfg}
    configuration = {
        "framework": "pytorch", "task": TASKS[1], "model": sections[1], "video_to_video": sections[2],
        "pipeline": {"type": "image-to-video-task-pipeline"},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configuration.json").write_text(json.dumps(configuration, indent=2), encoding="utf-8")


def prepare(folder: Path, stage: int, device: torch.device) -> str:
    """Write what is missing of a stage's weights, or say why the stage cannot be measured here."""
    settings = load_settings(folder, TASKS[stage])
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            settings.ckpt_unet: UNet(settings.unet),
            settings.ckpt_autoencoder: Autoencoder(settings.autoencoder),
        }
    networks[settings.ckpt_clip] = build_clip(settings.clip)
    sizes = {name: _FLOAT * _parameters(each) for name, each in networks.items()}
    missing = [name for name in networks if not (folder / name).exists()]
    needed = sum(sizes[name] * (_RATIO if name == settings.ckpt_autoencoder else 1) for name in missing)
    free = shutil.disk_usage(folder).free
    if needed >= free:
        return f"its files need {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free in {folder}"
    # Both sides' weights, and the largest file read beside them: about three times the UNet.
    needed, free = 3.3 * max(sizes.values()), _free_memory()
    if device.type == "cpu" and needed >= free:
        return f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
    for name in missing:
        partial = folder / f"{name}.partial"
        torch.save(_contents(name, networks[name], settings), partial)
        os.replace(partial, folder / name)
    return ""


def _parameters(network: nn.Module) -> int:
    return sum(value.numel() for value in network.state_dict().values())


def _free_memory() -> float:
    """Bytes, or infinity where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return math.inf


def _contents(name: str, network: nn.Module, settings: StageSettings) -> dict[str, Any]:
    """What a weights file holds: random values, in the published file's form.

    Tensors only: the foreign class in the published autoencoder's file would keep the stock from reading it.
    """
    state: dict[str, Any] = random_state_dict(network)
    if name == settings.ckpt_autoencoder:
        rest = int((_RATIO - 1) * _parameters(network))
        state = {f"first_stage_model.{key}": value for key, value in state.items()}
        for number, start in enumerate(range(0, rest, _FILLER)):
            state[f"model.diffusion_model.{number}.weight"] = torch.zeros(min(_FILLER, rest - start))
    return state if name == settings.ckpt_clip else {"state_dict": state}


@dataclass(frozen=True)
class Case:
    """The inputs of one stage, the same for both sides, float32 on the CPU.

    ``noise`` and ``latents`` are [1, 4, F, h, w]; ``image`` is [1, 3, 224, 224]; ``frames`` are
    [F, 3, H, W] in [-1, 1], their ``posterior_noise`` [F, 4, h, w]; ``y`` and ``negative_y`` are the UNet's
    conditioning: stage one's an image embedding [1, 1, D] and zeros, stage two's [1, 77, D].
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


def draw_case(folder: Path, stage: int) -> Case:
    """The inputs of a stage of a folder."""
    settings = load_settings(folder, TASKS[stage])
    seeded = torch.Generator().manual_seed(0)
    frames, height, width = settings.max_frames, settings.latent_hei, settings.latent_wid
    shape = (1, 4, frames, height, width)
    y = torch.randn(1, 1 if stage == 1 else 77, settings.unet.y_dim, generator=seeded)
    return Case(
        stage=stage,
        settings=settings,
        noise=torch.randn(shape, generator=seeded),
        latents=torch.randn(shape, generator=seeded),
        image=torch.randn(1, 3, 224, 224, generator=seeded),
        frames=torch.rand(frames, 3, 8 * height, 8 * width, generator=seeded) * 2 - 1,
        posterior_noise=torch.randn(frames, 4, height, width, generator=seeded),
        y=y,
        negative_y=torch.zeros_like(y) if stage == 1 else torch.randn(y.shape, generator=seeded),
    )
