"""Write a small two-stage model with random weights, in the hub's layout and file formats.

Everything but the sizes and the weights is as in the real ones: what the tests and the benchmark load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, Mapping

import numpy as np
import torch
from torch import nn

from modelscope_i2v.models.autoencoder import Autoencoder, AutoencoderConfig
from modelscope_i2v.models.clip import ClipConfig, build_clip
from modelscope_i2v.models.unet import UNet, UNetConfig
from modelscope_i2v.settings.configuration import FILE_NAME
from modelscope_i2v.settings.stages import ImageToVideoSettings, StageSettings, VideoToVideoSettings

#: Where each stage's folder stands in a small model's folder: as its id on the hub.
IMAGE_TO_VIDEO_ID = "damo/Image-to-Video"
VIDEO_TO_VIDEO_ID = "damo/Video-to-Video"

_WIDTH = 64  # of CLIP's embedding, and so of the context
_UNET: dict[str, Any] = {
    "dim": 32, "y_dim": _WIDTH, "context_dim": _WIDTH, "dim_mult": [1, 2, 2, 2], "num_heads": 4,
    "head_dim": 16, "num_res_blocks": 1,
}  # fmt: skip
_AUTOENCODER: dict[str, Any] = {
    "ddconfig": {"ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    "embed_dim": 4,
}
_CLIP = {
    "embed_dim": _WIDTH,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": _WIDTH, "heads": 2, "layers": 3},
}

#: The default sizes: a video that two cores generate in a minute.
SMALL_SETTINGS: dict[str, dict[str, Any]] = {
    "image-to-video": {"max_frames": 16, "latent_hei": 16, "latent_wid": 28, "steps": 10, "seed": 666},
    "video-to-video": {"max_frames": 16, "latent_hei": 34, "latent_wid": 56, "steps": 6, "seed": 666},
}


def random_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return a parameter's random value, float32: of nothing but its name, its shape and the seed.

    Two or more dimensions: normal with variance 1 / fan-in. One: about 1 for a norm's weight, about 0 for a
    bias. None: 1.
    """
    if not shape:
        return np.ones((), np.float32)
    key = np.array([zlib.crc32(name.encode()), seed], dtype=np.uint64)
    normal = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2:
        return normal / np.float32(math.sqrt(math.prod(shape[1:])))
    return 1 + np.float32(0.1) * normal if name.endswith("weight") else np.float32(0.02) * normal


def random_state_dict(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random values for every parameter of a module, which may be on the meta device."""
    return {
        name: torch.from_numpy(np.asarray(random_weight(name, tuple(value.shape), seed)))
        for name, value in module.state_dict().items()
    }


def make_small_model(
    folder: str | Path, settings: Mapping[str, Mapping[str, Any]] | None = None, seed: int = 0
) -> tuple[Path, Path]:
    """Write both stages' model folders below ``folder``, under their ids on the hub.

    Args:
        folder: is created if it is not there.
        settings: by stage, entries of ``model_cfg`` over those of ``SMALL_SETTINGS``.
        seed: of the weights.

    Returns:
        The folders of stage one and stage two.
    """
    folders = Path(folder) / IMAGE_TO_VIDEO_ID, Path(folder) / VIDEO_TO_VIDEO_ID
    stages: tuple[type[StageSettings], ...] = (ImageToVideoSettings, VideoToVideoSettings)
    for path, stage_settings in zip(folders, stages):
        path.mkdir(parents=True, exist_ok=True)
        given = {**SMALL_SETTINGS[stage_settings.stage], **(settings or {}).get(stage_settings.stage, {})}
        configuration = _configuration(stage_settings, given)
        (path / FILE_NAME).write_text(json.dumps(configuration, indent=2), encoding="utf-8")
        _write_unet(path / stage_settings.ckpt_unet, stage_settings, seed)
    first, second = folders
    _write_autoencoder(first / ImageToVideoSettings.ckpt_autoencoder, seed)
    clip = build_clip(ClipConfig(model_cfg=_CLIP))
    torch.save(random_state_dict(clip, seed), first / ImageToVideoSettings.ckpt_clip)
    for name in (ImageToVideoSettings.ckpt_autoencoder, ImageToVideoSettings.ckpt_clip):
        _link(first / name, second / name)  # as on the hub, these two files are the same in both
    return folders


def _configuration(stage: type[StageSettings], settings: Mapping[str, Any]) -> dict[str, Any]:
    pipelines = {
        "image-to-video": "image-to-video-task-pipeline",
        "video-to-video": "video-to-video-pipeline",
    }
    model_args = {name: getattr(stage, name) for name in ("ckpt_clip", "ckpt_unet", "ckpt_autoencoder")}
    if stage is VideoToVideoSettings:
        model_args["solver_mode"] = "fast"
    return {
        "framework": "pytorch",
        "task": stage.stage,
        "model": {
            "type": f"{stage.stage}-model",
            "model_args": model_args,
            "model_cfg": {
                "batch_size": 1, "target_fps": 8, **settings,
                "UNet": _UNET, "auto_encoder": _AUTOENCODER, "embedder": {"model_cfg": _CLIP},
            },
        },
        "pipeline": {"type": pipelines[stage.stage]},
    }  # fmt: skip


def _write_unet(path: Path, stage: type[StageSettings], seed: int) -> None:
    architecture: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in _UNET.items()
    }
    differences: dict[str, Any] = (
        {} if stage is ImageToVideoSettings else {"image_conditioned": False, "row_padding": 2}
    )
    with torch.device("meta"):
        unet = UNet(UNetConfig(**architecture, **differences))
    torch.save({"state_dict": random_state_dict(unet, seed)}, path)


def _write_autoencoder(path: Path, seed: int) -> None:
    """Write a Stable Diffusion checkpoint: the autoencoder among foreign keys and a foreign object."""
    ddconfig = _AUTOENCODER["ddconfig"]
    config = AutoencoderConfig(**{**ddconfig, "ch_mult": tuple(ddconfig["ch_mult"])})
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    state = {
        f"first_stage_model.{name}": value for name, value in random_state_dict(autoencoder, seed).items()
    }
    state["model.diffusion_model.time_embed.0.weight"] = torch.zeros(8, 8)
    state["cond_stage_model.model.logit_scale"] = torch.ones(())
    torch.save({"epoch": 0, "global_step": np.int64(875_000), "state_dict": state}, path)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        target.write_bytes(source.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="damo/Image-to-Video and damo/Video-to-Video go below it")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    arguments = parser.parse_args()
    for folder in make_small_model(arguments.folder, seed=arguments.seed):
        print(folder)


if __name__ == "__main__":
    main()
