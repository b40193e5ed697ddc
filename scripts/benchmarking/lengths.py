"""Our denoising against the length of the video: seconds, and the most that is held meanwhile."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Sequence

import torch

from modelscope_i2v.errors import MissingPackageError

from .folders import prepare, read_settings
from .fresh import MIB, ProcessFailed, forget_peak, in_fresh_process, peak_bytes
from .options import Options
from .ours import Ours, windows
from .sizes import Case, draw_case
from .timing import Missing, Samples, Stopwatch, in_rounds

#: The lengths, in ``max_frames`` of the case, which are also a window's frames.
FACTORS = (1, 2, 4)


@dataclass(frozen=True)
class LengthRow:
    """One line of the table: a video of so many frames, denoised in so many windows."""

    name: str
    frames: int
    windows: int
    seconds: Samples | Missing
    peak: Samples | Missing

    def seconds_per(self, count: int) -> float | None:
        """The median's share of one of so many parts."""
        return None if isinstance(self.seconds, Missing) else self.seconds.median / count


def length_rows(stage: int, options: Options, report: Callable[[str], None]) -> list[LengthRow]:
    """A stage's rows, each with numbers or with a reason why it has none."""
    settings = read_settings(options.folder, stage)
    lengths = [factor * settings.max_frames for factor in FACTORS]
    reason = prepare(options.folder, settings, options.device, report)
    seconds: Sequence[Samples | Missing] = [Missing(reason)] * len(lengths)
    peaks = seconds
    if not reason:
        try:
            seconds, peaks = _measured(stage, lengths, options, report)
        except (torch.cuda.OutOfMemoryError, MemoryError, MissingPackageError) as error:
            seconds = peaks = [Missing(str(error).partition(". ")[0])] * len(lengths)
        gc.collect()
    return [
        LengthRow(f"stage {stage}: {frames} frames", frames, windows(settings, frames), took, peak)
        for frames, took, peak in zip(lengths, seconds, peaks)
    ]


def case_of_length(stage: int, folder: Path, frames: int) -> Case:
    """The stage's inputs for a video of so many frames."""
    return draw_case(stage, replace(read_settings(folder, stage), max_frames=frames))


def _measured(
    stage: int, lengths: Sequence[int], options: Options, report: Callable[[str], None]
) -> tuple[Sequence[Samples | Missing], Sequence[Samples | Missing]]:
    """Seconds, and peaks."""
    on_cuda = options.device.type == "cuda"
    # Before anything is loaded here: both at once need not fit.
    on_host = [] if on_cuda else [_host_peak(stage, frames, options, report) for frames in lengths]
    report(f"stage {stage}: loading ours, for videos of {', '.join(map(str, lengths))} frames")
    case = draw_case(stage, read_settings(options.folder, stage))
    ours = Ours(options.folder, case, options.device, options.precision, options.compile)
    cases = [case_of_length(stage, options.folder, frames) for frames in lengths]
    watches = [MemoryWatch(options.device) for _ in lengths]

    def run(which: int) -> float:
        ours.denoise(watches[which], cases[which], options.length_steps)
        return watches[which].seconds

    for which in range(2):  # a whole video at once, and windows of one
        run(which)
    runs = [lambda which=which: run(which) for which in range(len(lengths))]
    seconds = in_rounds(runs, options.repeats)
    return seconds, on_host or [Samples((watch.device_peak / MIB,), "MiB") for watch in watches]


class MemoryWatch(Stopwatch):
    """Also finds the most bytes that are held: by the device, and by this process if the system can tell."""

    device_peak = 0
    host_peak: int | None = None

    def start(self) -> None:
        self._known = forget_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        super().start()

    def stop(self) -> None:
        super().stop()
        self.host_peak = peak_bytes() if self._known else None
        if self.device.type == "cuda":
            self.device_peak = torch.cuda.max_memory_allocated(self.device)


def _host_peak(stage: int, frames: int, options: Options, report: Callable[[str], None]) -> Samples | Missing:
    report(f"stage {stage}: {frames} frames in a new process")
    arguments = str(options.folder.resolve()), stage, frames, options.length_steps
    try:
        mib = in_fresh_process(host_growth, *arguments, options.precision, options.compile)
    except ProcessFailed as error:
        return Missing(str(error))
    return Missing("needs a system that can forget a peak") if mib is None else Samples((mib,), "MiB")


def host_growth(
    folder_name: str, stage: int, frames: int, steps: int, precision: str, compile: bool
) -> float | None:
    """MiB by which this process grows to its peak in denoising, beyond the loaded networks and the inputs.

    None where the system cannot tell.
    """
    folder, device = Path(folder_name), torch.device("cpu")
    case = case_of_length(stage, folder, frames)
    ours = Ours(folder, draw_case(stage, read_settings(folder, stage)), device, precision, compile)
    forget_peak()
    before, watch = peak_bytes(), MemoryWatch(device)
    ours.denoise(watch, case, steps)
    return None if watch.host_peak is None else (watch.host_peak - before) / MIB
