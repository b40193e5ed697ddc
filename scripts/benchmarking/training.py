"""The rows of training: seconds and memory of a step, and of a clip's latents computed or read."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any, Iterable

import torch

from modelscope_i2v.media.video import Video
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.settings.training import TrainingSettings
from modelscope_i2v.training.data import read_items
from modelscope_i2v.training.fine_tuning import FineTuning
from modelscope_i2v.training.scenes import draw

from .cases import TASKS
from .measuring import MIB, Missing, Samples, forget_peak, peak_bytes, seconds
from .rows import Options, Row


def training_rows(stage: int, options: Options) -> list[list[str]]:
    """The cells of adapters and all weights, without checkpointing and with it, and of a clip's latents."""
    ways = {
        f"stage {stage}: {'all weights' if full else 'LoRA'}{', checkpointing' if kept else ''}": (full, kept)
        for full, kept in itertools.product((False, True), (False, True))
    }
    computed, read = (f"stage {stage}: a clip's latents, {how}" for how in ("computed", "from the cache"))

    def measure() -> list[Row]:
        rows, encoding = [], Missing("no run got so far")
        for name, way in ways.items():
            options.report(f"{name}: in a new process")
            found = options.in_process(train_steps, stage, *way, options.repeats)
            if isinstance(found, Missing):
                rows.append(Row(name, found, found))
                continue
            times, mib, encoding = found
            rows.append(Row(name, Samples(times), Samples((mib,), "MiB")))
        cells = encoding if isinstance(encoding, tuple) else (encoding, encoding)
        return [
            *rows,
            *(Row(name, cell, Missing("is not measured")) for name, cell in zip((computed, read), cells)),
        ]

    rows = options.measured(stage, [*ways, computed, read], measure)
    return [[row.name, str(row.first), str(row.second)] for row in rows]


def train_steps(
    folder: Path,
    device: str,
    precision: str,
    compile: bool,
    stage: int,
    full: bool,
    checkpointing: bool,
    repeats: int,
) -> tuple[tuple[float, ...], float, tuple[Samples, Samples]]:
    """Seconds of steps, the most MiB held in them, and seconds of a clip's encoding and of its reading."""
    settings = TrainingSettings(
        stage=TASKS[stage], full=full, checkpointing=checkpointing, steps=repeats + 1, precision=precision
    )
    own = load_settings(folder, TASKS[stage])
    with tempfile.TemporaryDirectory() as temporary:
        data = _clip(0, own.max_frames, own.frame_size)
        run = FineTuning(folder, data, temporary, settings, device=device, progress=False)
        items = read_items(_clip(1, own.max_frames, own.frame_size))
        took = [Samples((seconds(lambda: run.encoder.encode(items, False)),)) for _ in range(2)]
        states, on_gpu = run.states(), run.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(run.device)
        before = 0 if on_gpu else forget_peak()
        next(states)  # to warm up; what it takes of memory, the process keeps for the others
        times = tuple(seconds(lambda: next(states)) for _ in range(repeats))
        peak = torch.cuda.max_memory_allocated(run.device) if on_gpu else peak_bytes()
    return times, (peak - before) / MIB, (took[0], took[1])


def _clip(seed: int, frames: int, size: tuple[int, int]) -> Iterable[dict[str, Any]]:
    drawn, caption = draw(seed, frames, size, fps=8)
    return [{"video": Video(drawn, 8.0), "text": caption}]
