from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

# Read when torch is loaded, by child processes too. These networks are too small to share out: on a busy
# machine threads only wait for each other, and while they wait they spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from environments import Environment
from make_small_model import make_small_model
from sample_videos import moving_frames
from stage_pipelines import STAGES, built

from modelscope_i2v.media.video import video_bytes

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"

#: As small as the networks allow: a generation takes a second or two. In float32 on every machine.
TINY = {"max_frames": 4, "latent_wid": 16, "steps": 2, "seed": 666, "precision": "fp32"}
TINY_SETTINGS = {
    "image-to-video": {**TINY, "latent_hei": 8},
    "video-to-video": {**TINY, "latent_hei": 10},
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


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


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


@pytest.fixture(scope="module")
def i2v(small_model):
    """Stage one's pipeline."""
    return built(STAGES[0], small_model)


@pytest.fixture(scope="module")
def v2v(small_model):
    """Stage two's pipeline."""
    return built(STAGES[1], small_model)


@pytest.fixture(scope="module")
def clip(i2v, picture, tmp_path_factory) -> Path:
    """A video of stage one."""
    path = tmp_path_factory.mktemp("videos") / "i2v.mp4"
    i2v(str(picture), output_video=str(path))
    return path


@pytest.fixture(scope="module")
def pipes(small_model) -> dict:
    """Pipelines by stage, with one step a video: quick."""
    return {stage: built(stage, small_model, steps=1) for stage in STAGES}


@pytest.fixture(scope="module")
def inputs(picture, tmp_path_factory) -> dict[str, str]:
    """Files for ``pipes``."""
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    path.write_bytes(video_bytes(moving_frames(4, 40, 64)))
    return {STAGES[0]: str(picture), STAGES[1]: str(path)}


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of what the packages are built from, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy(entry, copy)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "modelscope_i2v", copy / "modelscope_i2v", ignore=ignore)
    return copy


@pytest.fixture(scope="session")
def wheel(source, builder, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    builder.pip("wheel", "--no-build-isolation", "-w", str(target), str(source))
    return next(target.glob("*.whl"))


@pytest.fixture(scope="session")
def builder(tmp_path_factory) -> Environment:
    """An environment that never holds this package."""
    return Environment(tmp_path_factory.mktemp("builder"))


@pytest.fixture(scope="session")
def by_wheel(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("by_wheel"))
    environment.pip("install", str(wheel))
    return environment


@pytest.fixture(scope="session")
def editable(source, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("editable"))
    environment.pip("install", "--no-build-isolation", "-e", str(source))
    return environment


@pytest.fixture(params=["by_wheel", "editable"])
def installed(request) -> Environment:
    return request.getfixturevalue(request.param)
