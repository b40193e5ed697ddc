"""Folders of clips that the project draws, for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from tiny_networks import built

from modelscope_i2v.media.video import write_video
from modelscope_i2v.models.config import UNetConfig
from modelscope_i2v.training.scenes import draw


def draw_folder(folder: Path, videos: int = 3, images: int = 1, frames: int = 4) -> Path:
    """Videos of 128x64 with captions in captions.jsonl, images with theirs beside them, and a broken file."""
    folder.mkdir()
    captions = []
    for seed in range(videos):
        drawn, caption = draw(seed, frames, (128, 64), fps=8)
        write_video(drawn, folder / f"{seed}.mp4", 8)
        captions.append({"file": f"{seed}.mp4", "text": caption})
    for seed in range(videos, videos + images):
        drawn, caption = draw(seed, 1, (128, 64), fps=8)
        Image.fromarray(drawn[0]).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(caption + "\n", encoding="utf-8")
    lines = "\n".join(map(json.dumps, captions))
    (folder / "captions.jsonl").write_text(lines + "\n", encoding="utf-8")
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    return folder


def with_smaller_unet(model: Path, folder: Path) -> Path:
    """A model folder with the autoencoder and CLIP of another, and a UNet that is trained in no time."""
    folder.mkdir()
    contents = json.loads((model / "configuration.json").read_text(encoding="utf-8"))
    architecture = {
        "dim": 16, "dim_mult": [1, 2], "attn_scales": [0.5], "num_res_blocks": 1, "num_groups": 4,
        "num_heads": 2, "head_dim": 8, "y_dim": 64, "context_dim": 64,
    }  # fmt: skip
    contents["model"]["model_cfg"]["UNet"] = architecture
    (folder / "configuration.json").write_text(json.dumps(contents), encoding="utf-8")
    files = contents["model"]["model_args"]
    for name in ("ckpt_clip", "ckpt_autoencoder"):
        (folder / files[name]).symlink_to(model / files[name])
    entries = {name: tuple(each) if isinstance(each, list) else each for name, each in architecture.items()}
    of_stage = {} if contents["task"] == "image-to-video" else {"image_conditioned": False, "row_padding": 2}
    unet = built(UNetConfig(**entries, **of_stage))
    save_file(unet.state_dict(), (folder / files["ckpt_unet"]).with_suffix(".safetensors"))
    return folder
