"""The benchmark's rows of lengths, and of both stages on a GPU: what is measured is what they say."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

from benchmarking import both_stages, lengths  # noqa: E402
from benchmarking.folders import read_settings  # noqa: E402
from benchmarking.fresh import ProcessFailed, forget_peak, in_fresh_process  # noqa: E402
from benchmarking.lengths import MemoryWatch, case_of_length, host_growth, length_rows  # noqa: E402
from benchmarking.options import Options  # noqa: E402
from benchmarking.ours import Ours, windows  # noqa: E402
from benchmarking.sizes import TINY, draw_case  # noqa: E402
from benchmarking.timing import Missing, Samples  # noqa: E402

from modelscope_i2v.models.unet import UNet  # noqa: E402
from modelscope_i2v.plugin import models  # noqa: E402

CPU = torch.device("cpu")
HELD = 512  # MiB: far more than the tiny networks take, and than what other tests left may give back


def options_of(folder: Path, device: torch.device = CPU) -> Options:
    """Of a run of these rows."""
    kinds = ("memory", "length")
    return Options(size=TINY, device=device, precision="fp32", repeats=2, kinds=kinds, folder=folder)


@pytest.fixture
def growing(monkeypatch):
    """Lets encoding, or each call of the UNet, hold so many MiB for a moment."""

    def grow(encoding: int = 0, unet: int = 0) -> None:
        encode_video, branches = models.encode_video, UNet.branches

        def encode(*args):
            torch.ones(encoding, 2**18)
            return encode_video(*args)

        def predict(*args, **keywords):
            torch.ones(unet, 2**18)
            return branches(*args, **keywords)

        monkeypatch.setattr(models, "encode_video", encode)
        monkeypatch.setattr(UNet, "branches", predict)

    return grow


@pytest.mark.parametrize(("frames", "count"), [(32, 1), (33, 2), (64, 3), (128, 5), (1024, 43)])
def test_windows_are_as_many_as_the_overlap_makes_them(small_model, frames, count):
    settings = replace(read_settings(small_model[0], 1), max_frames=32)
    assert windows(settings, frames) == count


@pytest.mark.parametrize("stage", [1, 2])
def test_a_long_video_is_denoised_in_windows_and_nothing_else_is_timed(small_model, monkeypatch, stage):
    folder = small_model[stage - 1]
    ours = Ours(folder, draw_case(stage, read_settings(folder, stage)), CPU, "fp32")
    seen, events = [], []
    branches = UNet.branches

    def predict(unet, x, *args, **keywords):
        seen.append(x.shape[2])
        events.append("unet")
        return branches(unet, x, *args, **keywords)

    class Watch:
        def start(self):
            events.append("start")

        def stop(self):
            events.append("stop")

    monkeypatch.setattr(UNet, "branches", predict)
    monkeypatch.setattr(models, "decode_video", lambda *_: pytest.fail("decoding is no part of this"))
    calls = []
    for frames in (4, 16):
        seen.clear()
        events.clear()
        ours.denoise(Watch(), case_of_length(stage, folder, frames), steps=2)
        assert events == ["start", *["unet"] * len(seen), "stop"] and set(seen) == {4}
        calls.append(len(seen))
    assert calls[1] == windows(ours.case.settings, 16) * calls[0] == 5 * calls[0] > 0


def test_rows_have_medians_and_peaks(small_model, monkeypatch):
    given = []

    def growth(function, *arguments):
        given.append((function, *arguments))
        if arguments[2] == 8:
            raise ProcessFailed("no such file")
        return None if arguments[2] == 16 else 50.0

    monkeypatch.setattr(lengths, "in_fresh_process", growth)
    folder = small_model[0]
    short, middle, long = length_rows(1, options_of(folder), lambda _: None)
    assert given == [(host_growth, str(folder), 1, frames, 2, "fp32", False) for frames in (4, 8, 16)]
    assert [(row.frames, row.windows) for row in (short, middle, long)] == [(4, 1), (8, 3), (16, 5)]
    assert all(len(row.seconds.values) == 2 and min(row.seconds.values) > 0 for row in (short, middle, long))
    assert short.seconds.median < long.seconds.median == 16 * long.seconds_per(16)
    assert short.peak == Samples((50.0,), "MiB") and middle.peak == Missing("no such file")
    assert long.peak == Missing("needs a system that can forget a peak")


def test_too_little_memory_is_a_reason(small_model, monkeypatch):
    def fail(*_):
        raise MemoryError("out of memory. Less is less")

    monkeypatch.setattr(lengths, "in_fresh_process", lambda *_: 1.0)
    monkeypatch.setattr(lengths, "Ours", fail)
    rows = length_rows(2, options_of(small_model[1]), lambda _: None)
    assert [row.windows for row in rows] == [1, 3, 5]
    assert {row.seconds for row in rows} == {row.peak for row in rows} == {Missing("out of memory")}
    assert rows[0].seconds_per(4) is None


@pytest.mark.skipif(not forget_peak(), reason="needs Linux's /proc/self/clear_refs")
def test_the_peak_is_that_of_denoising(small_model, growing):
    gc.collect()  # what other tests left, and gave back in between, would hide what is held here
    measured = small_model[1].as_posix(), 2, 8, 1, "fp32", False
    alone = host_growth(*measured)
    growing(encoding=4 * HELD)
    assert host_growth(*measured) < alone + HELD
    growing(unet=HELD)
    assert host_growth(*measured) < 2 * HELD  # less, where other tests' memory is given back meanwhile
    assert 0 < in_fresh_process(host_growth, *measured) < 0.9 * HELD  # there nothing is replaced


def test_the_peak_of_a_gpu_begins_anew_with_each_video(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: events.append("read") or 2**30)
    watch = MemoryWatch(torch.device("cuda"))
    watch.start()
    watch.stop()
    assert events == ["reset", "synchronize", "synchronize", "read"]
    assert watch.device_peak == 2**30 and watch.seconds >= 0


def test_both_stages_are_in_one_process(small_model, monkeypatch):
    events = []

    class Side:
        def __init__(self, folder, case, *given):
            self.stage = case.stage
            events.append((case.stage, *given))

        def share_autoencoder(self, other):
            events.append(f"{self.stage} shares {other.stage}'s")

        def generate(self, steps):
            events.append((self.stage, steps))

    monkeypatch.setattr(both_stages, "Ours", Side)
    monkeypatch.setattr(
        both_stages, "read_settings", lambda _, stage: read_settings(small_model[stage - 1], stage)
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert both_stages.peak_device_mib("folder", "cuda", "fp16", False, True) == 3072
    loaded = [(stage, torch.device("cuda"), "fp16", False, True) for stage in (1, 2)]
    assert events == [*loaded, "2 shares 1's", (1, 2), (2, 2)]


def test_both_stages_have_a_row_where_there_is_a_gpu(tmp_path, monkeypatch):
    def measured(function, *arguments):
        assert function is both_stages.peak_device_mib
        assert arguments[:-1] == (str(tmp_path), "cuda", "fp32", False)
        if arguments[-1] and fails:
            raise ProcessFailed("CUDA out of memory")
        return 6000.0 if arguments[-1] else 12000.0

    fails, why_not = False, ""
    monkeypatch.setattr(both_stages, "read_settings", lambda *_: None)
    monkeypatch.setattr(both_stages, "prepare", lambda *_: why_not)
    monkeypatch.setattr(both_stages, "in_fresh_process", measured)
    options = options_of(tmp_path, torch.device("cuda"))
    row = both_stages.both_stages_row(options, lambda _: None)
    assert row.reference == Samples((12000.0,), "MiB") and row.gain == 2
    fails = True
    row = both_stages.both_stages_row(options, lambda _: None)
    assert row.reference == Samples((12000.0,), "MiB") and row.measured == Missing("CUDA out of memory")
    why_not = "too little disk"
    row = both_stages.both_stages_row(options, lambda _: None)
    assert row.reference == row.measured == Missing("too little disk")
