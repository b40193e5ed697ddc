"""Where everything is when the device is a GPU: tensors, networks, and what they are moved by."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import relative_error
from pretended_gpu import GPU, pretended_gpu
from stage_pipelines import STAGES, built, video_of

from modelscope_i2v.engine.devices import device_of
from modelscope_i2v.media.video import read_video
from modelscope_i2v.models import triton_group_norm

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop

ONE, TWO = STAGES


@pytest.fixture(autouse=True)
def without_triton(monkeypatch):
    """Its kernels need a real one."""
    monkeypatch.setattr(triton_group_norm, "triton", None)


def networks(pipe) -> list[torch.nn.Module]:
    return [pipe.model.clip_encoder, pipe.model.generator, pipe.model.autoencoder]


def frames_of(pipe, source: str, **keywords) -> torch.Tensor:
    return torch.as_tensor(read_video(video_of(pipe(source, **keywords))).frames).float()


def test_it_refuses_what_a_gpu_refuses():
    with pretended_gpu() as gpu:
        on_gpu, on_cpu = torch.ones(2, device=gpu), torch.ones(2)
        assert on_gpu.is_cuda and (on_gpu * 2).device == (on_gpu + torch.tensor(1.0)).device == GPU
        assert (on_gpu.cpu() + on_cpu).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="same device"):
            on_gpu + on_cpu
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.Linear(2, 2)(on_gpu)


CALLS = {
    "stage one": (ONE, {}),
    "stage one, windows, approximate": (
        ONE,
        {"max_frames": 6, "solver": "dpmpp", "guidance_interval": [0, 500], "reuse_interval": 2},
    ),
    "stage two": (TWO, {"text": "a cat"}),
    "stage two, Heun, windows, another size": (
        TWO,
        {"solver_mode": "normal", "negative_prompt": "a dog", "chunk_size": 3, "resolution": [136, 88]},
    ),
    "stage two, approximate": (TWO, {"guidance_interval": [0, 500], "reuse_interval": 2}),
}


@pytest.mark.parametrize("stage, keywords", CALLS.values(), ids=CALLS)
def test_the_video_is_that_of_the_cpu(stage, keywords, small_model, inputs):
    expected = frames_of(built(stage, small_model), inputs[stage], **keywords)
    with pretended_gpu():
        pipe = built(stage, small_model, device="gpu")
        assert {device_of(each) for each in networks(pipe)} == {GPU}
        frames = frames_of(pipe, inputs[stage], **keywords)
    assert relative_error(frames, expected) < 0.04  # most of it the video encoder's


@pytest.mark.parametrize("precision, dtype", [("auto", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("stage", [ONE, TWO])
def test_half_precision(stage, precision, dtype, small_model, inputs):
    with pretended_gpu():
        pipe = built(stage, small_model, device="cuda:0", precision=precision)
        assert {parameter.dtype for each in networks(pipe) for parameter in each.parameters()} == {dtype}
        frames = frames_of(pipe, inputs[stage])
    assert frames.std() > 1


@pytest.mark.parametrize("stage", [ONE, TWO])
def test_in_low_memory_mode_one_network_at_a_time_is_there(stage, small_model, inputs, caplog):
    """Which is chosen where little is free."""
    seen = []
    with pretended_gpu(free=2**18), caplog.at_level(logging.WARNING):
        pipe = built(stage, small_model, device="gpu")

        def note(*_) -> None:
            seen.append([device_of(each) == GPU for each in networks(pipe)])

        for network in (pipe.model.generator.out, pipe.model.autoencoder.decoder):
            network.register_forward_pre_hook(note)
        frames_of(pipe, inputs[stage])
        assert [device_of(each).type for each in networks(pipe)] == ["cpu"] * 3
    assert pipe.model.stage.low_memory and "low-memory mode" in caplog.text
    assert [False, True, False] in seen and [False, False, True] in seen
    assert all(sum(each) == 1 for each in seen)
