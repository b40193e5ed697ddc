"""The rows of training: seconds and memory of a step, and of a clip's latents computed or read."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from modelscope_i2v.media.video import Video
from modelscope_i2v.settings.training import TrainingSettings
from modelscope_i2v.training.fine_tuning import FineTuning
from modelscope_i2v.training.scenes import draw

from .cases import TASKS
from .measuring import MIB, Missing, Samples, forget_peak, peak_bytes, seconds
from .rows import Options

TITLES = ("seconds of a step", "memory in a step")


def training_rows(stage: int, options: Options) -> list[list[str]]:
    """The cells of adapters and all weights, with checkpointing and without, and of a clip's latents."""
    cells, encoding = [], None
    for full, checkpointing in itertools.product((False, True), (False, True)):
        what = "all weights" if full else "LoRA"
        name = f"stage {stage}: {what}, {'with' if checkpointing else 'without'} checkpointing"
        options.report(f"{name}: in a new process")
        found = options.in_process(train_steps, stage, full, checkpointing, options.repeats)
        if isinstance(found, Missing):
            cells.append([name, str(found), str(found)])
            continue
        times, mib, encoding = found
        cells.append([name, str(Samples(times)), str(Samples((mib,), "MiB"))])
    if encoding is not None:
        for how, took in zip(("computed", "from the cache"), encoding):
            cells.append([f"stage {stage}: a clip's latents, {how}", str(Samples((took,))), "-"])
    return cells


def train_steps(
    folder: Path,
    device: str,
    precision: str,
    compile: bool,
    stage: int,
    full: bool,
    checkpointing: bool,
    repeats: int,
) -> tuple[tuple[float, ...], float, tuple[float, float]]:
    """Seconds of ``repeats`` steps, the most MiB held in them, and seconds of encoding a clip twice."""
    settings = TrainingSettings(
        stage=TASKS[stage], full=full, checkpointing=checkpointing, steps=repeats + 1, precision=precision
    )
    with tempfile.TemporaryDirectory() as temporary:
        run: Any = FineTuning(folder, [_clip(0)], temporary, settings, device=device, progress=False)
        from modelscope_i2v.training.data import read_items

        other = read_items([_clip(1)])
        encoding = (
            seconds(lambda: run.encoder.encode(other, False)),
            seconds(lambda: run.encoder.encode(other, False)),
        )
        states = run.states()
        next(states)  # to warm up
        on_gpu = run.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(run.device)
        before = 0 if on_gpu else forget_peak()
        times = tuple(seconds(lambda: next(states)) for _ in range(repeats))
        peak = torch.cuda.max_memory_allocated(run.device) if on_gpu else peak_bytes()
    return times, (peak - before) / MIB, encoding


def _clip(seed: int) -> dict[str, Any]:
    frames, caption = draw(seed, 32, (448, 256), fps=8)
    return {"video": Video(frames, 8.0), "text": caption}
