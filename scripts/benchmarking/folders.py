"""Writes a model folder with random weights that either implementation can load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

from modelscope_i2v.models.autoencoder import Autoencoder
from modelscope_i2v.models.unet import UNet
from modelscope_i2v.settings.configuration import (
    FILE_NAME,
    SECOND_STAGE_SECTION,
    ImageToVideoSettings,
    StageSettings,
    VideoToVideoSettings,
    load_settings,
)
from modelscope_i2v.weights.small_model import random_state_dict

from .sizes import STAGE_NAMES, Size

#: The published autoencoder's file holds this many times the autoencoder, all of Stable Diffusion.
_AUTOENCODER_FILE_RATIO = 15.6
_FILLER = 2**26  # elements of one tensor of what else the file holds
_FLOAT = 4  # bytes


def write_configuration(folder: Path, size: Size) -> None:
    """The ``configuration.json`` of both stages in one folder."""
    sections = {stage: _model(stage, size) for stage in STAGE_NAMES}
    configuration = {
        "framework": "pytorch",
        "task": STAGE_NAMES[1],
        "model": sections[1],
        SECOND_STAGE_SECTION: sections[2],
        "pipeline": {"type": "image-to-video-task-pipeline"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(configuration, indent=2), encoding="utf-8")


def _model(stage: int, size: Size) -> dict[str, Any]:
    settings = ImageToVideoSettings if stage == 1 else VideoToVideoSettings
    model_args = {name: getattr(settings, name) for name in ("ckpt_clip", "ckpt_unet", "ckpt_autoencoder")}
    frames, height, width = size.latents[stage]
    model_cfg: dict[str, Any] = {
        "seed": 0, "batch_size": 1, "max_frames": frames, "latent_hei": height, "latent_wid": width,
    }  # fmt: skip
    model_cfg.update({"UNet": size.unet, "auto_encoder": size.autoencoder})
    if size.clip:
        model_cfg["embedder"] = {"model_cfg": size.clip}
    return {"type": f"{STAGE_NAMES[stage]}-model", "model_args": model_args, "model_cfg": model_cfg}


def read_settings(folder: Path, stage: int) -> StageSettings:
    """A stage's settings in a folder that was written here."""
    return load_settings(folder, STAGE_NAMES[stage])


def _networks(settings: StageSettings) -> dict[str, nn.Module]:
    with torch.device("meta"):
        unet, autoencoder = UNet(settings.unet), Autoencoder(settings.autoencoder)
    return {
        settings.ckpt_unet: unet,
        settings.ckpt_autoencoder: autoencoder,
        settings.ckpt_clip: settings.clip.build(),
    }


def _weights(network: nn.Module) -> int:
    return sum(value.numel() for value in network.state_dict().values())


def parameters(settings: StageSettings) -> dict[str, int]:
    """Numbers of parameters of a stage's networks, CLIP with both towers, by file name."""
    return {name: _weights(network) for name, network in _networks(settings).items()}


def missing_bytes(folder: Path, settings: StageSettings) -> int:
    """What the stage's weights files that are not there yet will take."""
    total = 0
    for name, count in parameters(settings).items():
        ratio = _AUTOENCODER_FILE_RATIO if name == settings.ckpt_autoencoder else 1.0
        total += 0 if (folder / name).exists() else int(_FLOAT * count * ratio)
    return total


def lacks_disk(folder: Path, settings: StageSettings) -> str:
    """Why the stage cannot be written, or nothing."""
    needed, free = missing_bytes(folder, settings), shutil.disk_usage(folder).free
    if needed < free:
        return ""
    return f"its files need {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free in {folder}"


def lacks_memory(settings: StageSettings, device: torch.device) -> str:
    """Why both sides do not fit into this machine's memory, or nothing. Where it cannot be told: nothing."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return ""
    # Both sides' weights, and the largest file read beside them: about three times the UNet.
    needed = 3.3 * _FLOAT * max(parameters(settings).values()) if device.type == "cpu" else 0
    if needed < free:
        return ""
    return f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"


def prepare(
    folder: Path, settings: StageSettings, device: torch.device, report: Callable[[str], None]
) -> str:
    """Write what is missing of the stage's weights, or say why the stage cannot be measured here."""
    reason = lacks_disk(folder, settings) or lacks_memory(settings, device)
    if not reason:
        report(f"{settings.stage}: its weights are in {folder}")
        write_weights(folder, settings)
    return reason


def write_weights(folder: Path, settings: StageSettings) -> None:
    """Those of a stage's weights files that are not there yet; each appears when it is complete."""
    for name, network in _networks(settings).items():
        path = folder / name
        if path.exists():
            continue
        state = random_state_dict(network)
        if name == settings.ckpt_unet:
            contents: Any = {"state_dict": state}
        elif name == settings.ckpt_autoencoder:
            contents = {"state_dict": _stable_diffusion(state)}
        else:
            contents = state
        partial = path.with_name(path.name + ".partial")
        torch.save(contents, partial)
        os.replace(partial, path)


def _stable_diffusion(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An autoencoder among so much else as the published file holds.

    Tensors only: the published file's foreign class would keep the stock way from reading it at all.
    """
    rest = int((_AUTOENCODER_FILE_RATIO - 1) * sum(value.numel() for value in state.values()))
    contents = {f"first_stage_model.{name}": value for name, value in state.items()}
    for number in range(-(-rest // _FILLER)):
        length = min(_FILLER, rest - number * _FILLER)
        contents[f"model.diffusion_model.{number}.weight"] = torch.zeros(length)
    return contents
