"""When memory runs out: less at a time, the same result, and an error that says what would fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modelscope.pipelines import pipeline

from modelscope_i2v.engine.memory.out_of_memory import (
    OutOfMemory,
    is_out_of_memory,
    not_enough,
    with_less_at_a_time,
)
from modelscope_i2v.errors import I2VError, NotEnoughMemoryError
from modelscope_i2v.models.transformers import GEGLU
from modelscope_i2v.settings.request import Request
from modelscope_i2v.settings.stages import ImageToVideoSettings, VideoToVideoSettings

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop

CPU = torch.device("cpu")


def limited(limit: int, tried: list[int]):
    """Work that needs as many bytes as its amount, of which there are so many."""

    def work(amount: int) -> str:
        tried.append(amount)
        if amount > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return f"done with {amount}"

    return work


@pytest.mark.parametrize("limit, expected", [(100, [8]), (4, [8, 4]), (1, [8, 4, 2, 1])])
def test_less_is_tried_until_it_fits(limit, expected, caplog):
    tried = []
    result = with_less_at_a_time(limited(limit, tried), [8, 4, 2, 1], "decoding {} frames at a time", CPU)
    assert (result, tried) == (f"done with {expected[-1]}", expected)
    lines = [f"out of memory on cpu: trying again, decoding {each} frames at a time" for each in expected[1:]]
    assert [record.getMessage() for record in caplog.records] == lines


def test_where_the_least_does_not_fit_that_is_an_error():
    with pytest.raises(OutOfMemory, match="Tried to allocate") as failure:
        with_less_at_a_time(limited(0, []), [2, 1], "{}", CPU)
    assert isinstance(failure.value.__cause__, torch.cuda.OutOfMemoryError)


def test_other_errors_are_not_tried_again():
    tried = []

    def work(amount):
        tried.append(amount)
        raise RuntimeError("expected scalar type Half but found Float")

    with pytest.raises(RuntimeError, match="scalar type"):
        with_less_at_a_time(work, [2, 1], "{}", CPU)
    assert tried == [2]


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60)
    assert is_out_of_memory(failure.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def fail_above(network: torch.nn.Module, kind: type, elements: int) -> list:
    """Let layers of a kind run out of memory where their result is larger."""

    def check(_, __, output):
        if output.numel() > elements:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    return [layer.register_forward_hook(check) for layer in network.modules() if isinstance(layer, kind)]


def test_denoising_goes_on_in_smaller_parts(small_model, picture, caplog):
    pipe = pipeline("image-to-video", model=str(small_model[0]), device="cpu", resolution=[256, 256])
    frames = pipe.generate(str(picture)).frames.astype(int)
    one_frame = 32 * 32 * 32 * 4  # latent, width, GEGLU
    hooks = fail_above(pipe.model.generator, GEGLU, one_frame)
    try:
        with caplog.at_level("WARNING"):
            again = pipe.generate(str(picture)).frames.astype(int)
    finally:
        for hook in hooks:
            hook.remove()
    assert "out of memory on cpu: trying again, with layers in parts of" in caplog.text
    assert abs(frames - again).max() <= 1
    assert pipe.model.stage._chunk_limit.elements <= 2 * one_frame  # and stays so


def test_decoding_goes_on_with_fewer_frames(small_model, picture, caplog):
    pipe = pipeline("image-to-video", model=str(small_model[0]), device="cpu")
    frames = pipe.generate(str(picture)).frames.astype(int)
    hooks = fail_above(pipe.model.autoencoder, type(pipe.model.autoencoder.decoder), 3 * 64 * 128)
    try:
        with caplog.at_level("WARNING"):
            again = pipe.generate(str(picture)).frames.astype(int)
    finally:
        for hook in hooks:
            hook.remove()
    lines = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert lines == [
        f"out of memory on cpu: trying again, decoding {count} frames at a time" for count in (4, 2, 1)
    ]
    assert abs(frames - again).max() <= 1


def test_a_generation_that_cannot_fit_says_in_which_phase(small_model, picture):
    pipe = pipeline("image-to-video", model=str(small_model[0]), device="cpu")
    for part, phase in ((pipe.model.clip_encoder, "clip"), (pipe.model.generator, "denoising")):
        hooks = fail_above(part, torch.nn.Linear, 0)
        words = f"image-to-video, {phase}: out of memory on cpu"
        with pytest.raises(NotEnoughMemoryError, match=words) as error:
            pipe.generate(str(picture))
        for hook in hooks:
            hook.remove()
        assert isinstance(error.value, I2VError) and isinstance(error.value, MemoryError)
    pipe.generate(str(picture))  # the pipeline is as good as before


def error_for(monkeypatch, there: int, settings, low_memory: bool = False) -> str:
    monkeypatch.setattr(
        "modelscope_i2v.engine.memory.out_of_memory._memory", lambda device: (there, 24 * 2**30)
    )
    request = Request.resolve(settings)
    return str(not_enough(settings, request, 32, "denoising", torch.device("cuda"), low_memory))


def test_the_error_names_what_is_needed_what_there_is_and_what_would_fit(monkeypatch):
    error = error_for(monkeypatch, 7 * 2**30, VideoToVideoSettings())
    assert error.startswith(
        "video-to-video, denoising: out of memory on cuda, even with the least at a time: 1280x720 with "
        "32 frames at a time need about 7.0 GiB, 7.0 GiB of 24 GiB can be had. "
        "These would fit: low_memory true ("
    )
    assert "chunk_size 16" in error and "resolution [640, 360]" in error
    error = error_for(monkeypatch, 5 * 2**30, VideoToVideoSettings(), low_memory=True)
    assert "low_memory" not in error and "These would fit: chunk_size 16 (" in error
    error = error_for(monkeypatch, 6 * 2**30, ImageToVideoSettings(resolution=(1280, 720)))
    assert "max_frames" in error
    error = error_for(monkeypatch, 2**30, VideoToVideoSettings())
    assert "These would fit" not in error and "a smaller resolution need less" in error


SCRIPT = """
import json, resource, sys
import torch
from modelscope.pipelines import pipeline
from modelscope_i2v.errors import NotEnoughMemoryError

settings = {"resolution": [768, 768], "max_frames": 2, "steps": 1}
pipe = pipeline("image-to-video", model=sys.argv[1], device="cpu", **settings)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20,) * 2)
try:
    pipe(sys.argv[2])
except NotEnoughMemoryError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limit on address space")
def test_memory_that_really_runs_out_is_an_error_that_helps(small_model, picture):
    command = [sys.executable, "-c", SCRIPT, str(small_model[0]), str(picture)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    message = json.loads(result.stdout.splitlines()[-1])
    assert message.startswith("image-to-video, ") and "out of memory on cpu" in message
