"""Pipelines that can be trusted: usable after any failure, alone in their settings, and without a trace."""

from __future__ import annotations

import builtins
import gc
import hashlib
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline
from stage_pipelines import STAGES, built, video_of

from modelscope_i2v import errors
from modelscope_i2v.errors import (
    ConfigurationError,
    InvalidInputError,
    MissingFileError,
    OutputError,
)
from modelscope_i2v.media.video import read_video
from modelscope_i2v.models.autoencoder import Autoencoder
from modelscope_i2v.models.clip import ClipImageEncoder, ClipTextEncoder
from modelscope_i2v.models.unet import UNet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def idle_bytes(pipes) -> int:
    """Memory of tensors before the first call."""
    return tensor_bytes()


@pytest.fixture(scope="module")
def expected(pipes, inputs, idle_bytes) -> dict[str, bytes]:
    """The bytes that each stage makes of its file."""
    return {stage: pipes[stage](inputs[stage])[OutputKeys.OUTPUT_VIDEO] for stage in STAGES}


def tensor_bytes(device: str = "cpu") -> int:
    """Memory of all tensors that are alive."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == device:
            with suppress(RuntimeError):  # other tests leave tensors that only trace shapes, and are nowhere
                storages[each.data_ptr()] = each.nbytes
    return sum(storages.values())


# After a failure

#: Where a call may be when it fails: by stage, what is replaced by something that raises.
PHASES = {
    (STAGES[0], "reading"): ("modelscope_i2v.plugin.preprocessors.open_image",),
    (STAGES[0], "clip"): (ClipImageEncoder, "forward"),
    (STAGES[0], "within a step"): (UNet, "forward"),
    (STAGES[0], "decoding"): (Autoencoder, "decode"),
    (STAGES[0], "writing"): ("modelscope_i2v.media.video_writing._to_yuv",),
    (STAGES[1], "reading"): ("modelscope_i2v.engine.video_to_video.open_video",),
    (STAGES[1], "clip"): (ClipTextEncoder, "forward"),
    (STAGES[1], "encoding"): (Autoencoder, "encode"),
    (STAGES[1], "within a step"): (UNet, "forward"),
    (STAGES[1], "decoding"): (Autoencoder, "decode"),
    (STAGES[1], "writing"): ("modelscope_i2v.media.video_writing._to_yuv",),
    (STAGES[0], "between steps"): None,
    (STAGES[1], "between steps"): None,
}


def outcome_of(call: Callable[[], Any]) -> type[BaseException] | None:
    """What a call raised. The exception itself is let go of: it holds the call's variables."""
    try:
        call()
    except BaseException as error:
        return type(error)
    return None


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage, phase", PHASES)
def test_after_a_failure_anywhere_the_next_call_is_as_ever(
    pipes, inputs, expected, idle_bytes, tmp_path, monkeypatch, stage, phase, raised
):
    def fail(*args: Any, **keywords: Any) -> None:
        raise raised("on purpose")

    path, keywords = tmp_path / "video.mp4", {"text": "so that CLIP runs"} if stage == STAGES[1] else {}
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        if PHASES[stage, phase] is None:
            keywords["callback"] = fail
        else:
            patch.setattr(*PHASES[stage, phase], fail)
        got = outcome_of(lambda: pipes[stage](inputs[stage], output_video=str(path), **keywords))
    assert got is not None and issubclass(got, OutputError if got is OutputError else raised)
    assert (got is OutputError) == (phase == "writing" and raised is not KeyboardInterrupt)
    assert tensor_bytes() <= idle_bytes
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"video.mp4": b"old"}
    assert video_of(pipes[stage](inputs[stage], output_video=str(path))) == expected[stage]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", STAGES)
def test_after_a_failure_the_devices_memory_is_back_where_it_was(small_model, inputs, stage):
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    pipe = built(stage, small_model, device="cuda:0")
    expected = video_of(pipe(inputs[stage]))
    before = torch.cuda.memory_allocated()
    assert outcome_of(lambda: pipe(inputs[stage], callback=fail)) is KeyboardInterrupt
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert video_of(pipe(inputs[stage])) == expected


def test_a_failure_in_a_list_or_a_preview_leaves_the_pipeline_usable(pipes, inputs, expected, tmp_path):
    pipe, picture = pipes[STAGES[0]], inputs[STAGES[0]]
    with pytest.raises(MissingFileError):
        pipe([picture, "none.png"], steps=1)
    with pytest.raises(MissingFileError):
        pipe.preview("none.png", [1, 2], output_folder=tmp_path)
    with pytest.raises(ConfigurationError, match="describes no second stage"):
        pipe(picture, refine=True)
    assert video_of(pipe(picture)) == expected[STAGES[0]]


@pytest.mark.parametrize("stage", STAGES)
def test_the_folder_may_be_edited_or_gone_once_it_is_loaded(small_model, inputs, expected, tmp_path, stage):
    folder = tmp_path / "model"
    shutil.copytree(small_model[STAGES.index(stage)], folder)
    pipe = pipeline(stage, model=str(folder), device="cpu", steps=1)
    sha256 = hashlib.sha256((folder / "configuration.json").read_bytes()).hexdigest()
    (folder / "configuration.json").write_text("{}")
    assert pipe(inputs[stage])["configuration_sha256"] == sha256
    shutil.rmtree(folder)
    assert np.array_equal(
        read_video(video_of(pipe(inputs[stage]))).frames, read_video(expected[stage]).frames
    )


# Threads


@pytest.mark.parametrize("stage", STAGES)
def test_threads_on_one_pipeline_take_turns_and_get_their_own_seeds_video(pipes, inputs, stage):
    pipe, seeds, order = pipes[stage], [1, 2, 3], []
    alone = [video_of(pipe(inputs[stage], seed=seed, steps=2)) for seed in seeds]
    assert len(set(alone)) == len(seeds)

    def call(seed: int) -> bytes:
        return video_of(pipe(inputs[stage], seed=seed, steps=2, callback=lambda *step: order.append(seed)))

    with ThreadPoolExecutor(len(seeds)) as threads:
        assert list(threads.map(call, seeds)) == alone
    assert len(order) == 2 * len(seeds) and order[::2] == order[1::2]  # each has both its steps in a row


def test_a_thread_that_fails_harms_no_other(pipes, inputs, expected):
    pipe, picture = pipes[STAGES[0]], inputs[STAGES[0]]

    def fail(*args: Any) -> None:
        raise RuntimeError

    def call(callback: Any) -> Any:
        try:
            return video_of(pipe(picture, callback=callback))
        except RuntimeError:
            return None

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(call, [None, fail, None, fail]))
    assert results == [expected[STAGES[0]], None, expected[STAGES[0]], None]


# Side by side


def test_two_pipelines_in_one_process_have_nothing_in_common(small_model, inputs, pipes, expected):
    stage, picture = STAGES[0], inputs[STAGES[0]]
    options = {"seed": 7, "resolution": [64, 64], "guide_scale": 5.0, "decoder_bs": 1, "fps": 12}
    other = built(stage, small_model, steps=1, **options)
    alone = video_of(other(picture))
    assert read_video(alone).frames.shape[1:3] == (64, 64)
    assert video_of(pipes[stage](picture)) == expected[stage]
    other.model.cfg.max_frames, other.chunk_size = 2, 2
    assert len(read_video(video_of(other(picture))).frames) == 2
    assert video_of(pipes[stage](picture)) == expected[stage]
    other.model.cfg.max_frames, other.chunk_size = 4, None
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(pipe, picture) for pipe in (other, pipes[stage])]
        assert [video_of(each.result()) for each in both] == [alone, expected[stage]]


def global_state() -> dict[str, Any]:
    """What a caller may have set for the whole process."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "type": torch.get_default_dtype(),
        "device": torch.empty(0).device,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "matmul": (torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32),
        "reduced": cuda.matmul.allow_fp16_reduced_precision_reduction,
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "torch's draws": torch.get_rng_state().numpy().tobytes(),
        "numpy's draws": np.random.get_state()[1].tobytes(),
        "python's draws": random.getstate(),
        "numpy's errors": np.geterr(),
        "print": builtins.print,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }


@pytest.fixture
def unusual_flags():
    """Flags that are not torch's defaults, so that resetting them to these is noticed too."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_global_is_changed(unusual_flags, small_model, inputs, monkeypatch, stage):
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    seen, before = [], global_state()
    pipe = built(stage, small_model, steps=1)
    assert global_state() == before
    pipe(inputs[stage], callback=lambda *step: seen.append(torch.get_float32_matmul_precision()))
    assert global_state() == before and seen == ["high"]
    assert outcome_of(lambda: pipe(inputs[stage], callback=fail)) is KeyboardInterrupt
    assert global_state() == before
    with pytest.raises(InvalidInputError):
        pipe(inputs[stage], steps=1, resolution=(8192, 8192))
    assert global_state() == before


LIVES = """
import gc, os, sys, weakref
from modelscope_i2v.plugin.pipelines import ImageToVideoPipeline, VideoToVideoPipeline
stage, folder, source = sys.argv[1:]
build = {"image-to-video": ImageToVideoPipeline, "video-to-video": VideoToVideoPipeline}[stage]
for _ in range(5):
    pipe = build(folder, device="cpu", steps=1)
    video, model = pipe(source)["output_video"], weakref.ref(pipe.model)
    del pipe
    gc.collect()
    resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
    print("life", hash(video), model() is None, resident)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is as Linux tells it")
@pytest.mark.parametrize("stage", STAGES)
def test_built_used_deleted_and_built_again(small_model, inputs, tmp_path, stage):
    """Five times: no model stays alive, memory does not grow, and the temporary folder stays empty."""
    child = subprocess.run(  # a process of its own, where nothing else comes and goes
        [sys.executable, "-c", LIVES, stage, str(small_model[STAGES.index(stage)]), inputs[stage]],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    lives = [line.split()[1:] for line in child.stdout.splitlines() if line.startswith("life ")]
    assert len(lives) == 5
    assert {(video, gone) for video, gone, _ in lives} == {(lives[0][0], "True")}
    resident = [int(each) for _, _, each in lives]
    assert resident[-1] - resident[2] < 10 * 2**20  # one model is some twenty
    assert not list(tmp_path.iterdir())


# Files and programs


def test_no_other_program_is_started(pipes, inputs, tmp_path, monkeypatch):
    def refuse(*args: Any, **keywords: Any) -> None:
        pytest.fail(f"a program is started: {args}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    for name in ("system", "popen", "fork", "posix_spawn", "execv", "execve"):
        monkeypatch.setattr(os, name, refuse)
    for stage in STAGES:
        path = tmp_path / f"$(touch canary) ; `{stage}`.mp4"
        pipes[stage](inputs[stage], output_video=str(path))
        assert len(read_video(path).frames) == 4


def test_errors_are_few_and_each_is_the_matching_builtin():
    types = {each for each in vars(errors).values() if isinstance(each, type)}
    classes = {each for each in types if issubclass(each, errors.I2VError)} - {errors.I2VError}
    assert len(classes) <= 9
    for each in classes:
        assert issubclass(each, errors.I2VError) and each.__bases__[1].__module__ == "builtins"
        raised = each("words")  # ModelScope raises them anew, from their class and one text
        assert str(type(raised)(f"ImageToVideoModel: {raised}")) == "ImageToVideoModel: words"
