from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modelscope_i2v.small_model import make_small_model

FIXTURES = Path(__file__).parent / "fixtures"

#: As small as the networks allow: a generation takes a second or two.
TINY_SETTINGS = {
    "image-to-video": {"max_frames": 4, "latent_hei": 8, "latent_wid": 16, "steps": 2, "seed": 666},
    "video-to-video": {"max_frames": 4, "latent_hei": 10, "latent_wid": 16, "steps": 2, "seed": 666},
}


def load_fixture(name: str) -> dict[str, np.ndarray]:
    """Inputs and outputs of the published computation, by name."""
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def load_json(name: str):
    return json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))


def relative_error(ours: torch.Tensor, reference) -> float:
    """||ours - reference|| / ||reference||"""
    reference = torch.as_tensor(reference).to(ours)
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of stage one and stage two of a tiny model. Do not write into them."""
    return make_small_model(tmp_path_factory.mktemp("models"), TINY_SETTINGS)


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    """A picture with some content, as a PNG file."""
    from PIL import Image

    y, x = np.mgrid[:120, :200]
    channels = 127.5 * (1 + np.sin(x / 17)), 127.5 * (1 + np.cos(y / 11)), (3 * x + 5 * y) % 256
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(path)
    return path
