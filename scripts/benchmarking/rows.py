"""The rows: what each measures, and that both sides compute the same."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
from modelscope.pipelines import pipeline
from torch import Tensor
from torch.profiler import profile
from torch.utils.benchmark import timer

from modelscope_i2v.errors import I2VError

from .cases import PUBLISHED_STEPS, TASKS, Size, draw_case, prepare
from .measuring import (
    MIB,
    Cell,
    Missing,
    Row,
    Samples,
    forget_peak,
    in_fresh_process,
    in_turn,
    peak_bytes,
    seconds,
)  # fmt: skip
from .sides import Ours, Side, pictures, window_count
from .stock import Stock, import_stock

#: The kinds of rows that have the stock beside ours; ours beside ours; and ours alone.
STOCK_KINDS = ("step", "encode", "decode", "stage", "loading", "memory")
KINDS = (*STOCK_KINDS, "precision", "approximate", "length", "training")
#: Without what takes several videos with all their steps, or long ones, or trains.
DEFAULT_KINDS = KINDS[:-3]

TOLERANCE = 1e-4  # the largest relative difference of two float32 sides
_CHECKED_STEPS = 2  # they pass both branches of guidance through the whole UNet twice or thrice
#: The timesteps at which there is guidance, by stage: a generation goes from 999, or 599, down to about 0.
_GUIDANCE_INTERVALS = {1: ((0, 800), (200, 800)), 2: ((0, 450), (150, 450))}
_LENGTH_STEPS = 3  # the first is left out


class DisagreementError(RuntimeError):
    """The two sides compute different things, so that their times cannot be compared."""


@dataclass(frozen=True)
class Options:
    """What is measured, where and how. ``steps`` None is each row's own number."""

    size: Size
    folder: Path
    device: torch.device
    report: Callable[[str], None]
    precision: str = "auto"
    repeats: int = 3
    kinds: tuple[str, ...] = DEFAULT_KINDS
    steps: int | None = None
    compile: bool = False
    profile: bool = False

    def ours(self, stage: int, precision: str | None = None) -> Ours:
        self.report(f"stage {stage}: loading ours")
        case = draw_case(self.folder, stage)
        return Ours(self.folder, case, self.device, precision or self.precision, self.compile)

    def measured(self, stage: int, names: Iterable[str], measure: Callable[[], list[Row]]) -> list[Row]:
        """The rows that ``measure`` gives, or where this machine cannot, the reason beside each name."""
        if not names:
            return []
        try:
            reason = prepare(self.folder, stage, self.device)
            if not reason:
                return measure()
        except (torch.cuda.OutOfMemoryError, MemoryError, I2VError) as error:
            reason = str(error).partition(". ")[0]
        finally:
            gc.collect()
        return _without(names, reason)

    def in_process(self, function: Callable, *arguments: Any) -> Any:
        """What a function of this module returns in a fresh process, or why it returns nothing."""
        return in_fresh_process(
            function, self.folder, str(self.device), self.precision, self.compile, *arguments
        )


def _without(names: Iterable[str], reason: str) -> list[Row]:
    return [Row(name, Missing(reason), Missing(reason)) for name in names]


# The stock beside ours


def stock_rows(stage: int, options: Options) -> list[Row]:
    """The rows of both sides.

    Raises:
        DisagreementError: the sides' outputs differ.
    """
    steps = options.steps or options.size.steps[stage]
    titles = {"step": "one guided step", "encode": "VAE encode", "decode": "VAE decode"}
    titles["stage"] = f"whole, {steps} steps"
    kinds = [kind for kind in titles if kind in options.kinds and (kind, stage) != ("encode", 1)]
    names = {kind: f"stage {stage}: {titles[kind]}" for kind in kinds}
    in_this_process = [*([f"stage {stage}: compiling"] if options.compile else []), *names.values()]
    rows = []
    if kinds or options.profile:
        rows = options.measured(stage, in_this_process, lambda: _compute_rows(stage, names, steps, options))
    in_others: dict[str, tuple[str, str]] = {}  # the key in what ``load`` returns, and the unit
    if "loading" in options.kinds:
        in_others[f"stage {stage}: loading, seconds"] = ("seconds", "s")
        in_others[f"stage {stage}: loading, peak host memory"] = ("host", "MiB")
        in_others[f"stage {stage}: loading, weights in use"] = ("weights", "MiB")
    peak = f"stage {stage}: peak device memory"
    if "memory" in options.kinds and options.device.type == "cuda":
        in_others[peak] = ("device", "MiB")
    rows += options.measured(stage, in_others, lambda: _process_rows(stage, in_others, options))
    if "memory" in options.kinds and options.device.type != "cuda":
        rows += _without([peak], "needs a CUDA device")
    return rows


def _compute_rows(stage: int, names: dict[str, str], steps: int, options: Options) -> list[Row]:
    ours, rows = options.ours(stage), []
    if options.compile:
        first, second = (seconds(lambda: ours.generate(_CHECKED_STEPS)) for _ in range(2))
        took = Samples((max(first - second, 0.0),))
        rows.append(Row(f"stage {stage}: compiling", Missing("is not compiled"), took))
    sides: list[Side] = [ours]
    differences: dict[str, float] = {}
    try:
        sides.insert(0, Stock(options.folder, ours.case, options.device))
        differences = compare(*sides, names)
    except (ImportError, AttributeError) as error:
        why_not = Missing(f"the installed modelscope's cannot be used: {error}")
    for kind, name in names.items():
        options.report(f"{name}: measuring")
        runs = [_run(kind, side, steps) for side in sides]
        if kind not in differences or kind != "stage":  # the comparison has warmed up whole stages
            in_turn(runs, 1)
        *others, took = in_turn(runs, options.repeats)
        rows.append(Row(name, others[0] if others else why_not, took, differences.get(kind)))
    for side in sides if options.profile else []:
        options.report(f"stage {stage}, one guided step, {type(side).__name__.lower()}:\n{_profile(side)}")
    return rows


def _run(kind: str, side: Side, steps: int) -> Callable[[], float]:
    """Does a row's work once, and returns its seconds."""
    if kind == "step":
        return side.step_seconds
    work = {"encode": side.encode, "decode": side.decode, "stage": lambda: side.generate(steps)}[kind]
    return lambda: seconds(work)


def compare(stock: Side, ours: Side, kinds: Iterable[str]) -> dict[str, float]:
    """The relative differences of the sides' outputs, by kind of row.

    Raises:
        DisagreementError: both are in float32, and one is above ``TOLERANCE``.
    """
    # The deterministic sampler of stage two: its other one's noise hangs on the last bit of a logarithm.
    solver = {"solver_mode": "normal"} if ours.case.stage == 2 else {}
    outputs: dict[str, Callable[[Side], Tensor]] = {
        "step": lambda side: side.velocity(),
        "encode": lambda side: side.encode(),
        "decode": lambda side: side.decode(),
        "stage": lambda side: side.generate(_CHECKED_STEPS, **solver),
    }
    differences = {}
    for kind in kinds:
        difference = relative_difference(outputs[kind](ours), outputs[kind](stock))
        # Written so that a difference that is not a number is refused, too.
        if stock.precision == ours.precision == "fp32" and not difference < TOLERANCE:
            raise DisagreementError(
                f"{TASKS[ours.case.stage]}, {kind}: the outputs of the two sides differ by "
                f"{difference:.1e}, allowed is {TOLERANCE:.0e}: there is nothing to compare"
            )
        differences[kind] = difference
    return differences


def _profile(side: Side) -> str:
    profiler = profile()
    switches = iter([profiler.start, profiler.stop])
    side.marks(lambda: next(switches)())
    order = "self_cuda_time_total" if side.device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=20)


def _process_rows(stage: int, keys: dict[str, tuple[str, str]], options: Options) -> list[Row]:
    found: dict[str, list[Any]] = {"stock": [], "ours": []}
    for repeat in range(options.repeats):
        for side, results in found.items():
            options.report(f"stage {stage}: loading {side} in a process, {repeat + 1} of {options.repeats}")
            results.append(options.in_process(load, stage, side))

    def cell(side: str, key: str, unit: str) -> Cell:
        failed = next((each for each in found[side] if isinstance(each, Missing)), None)
        return failed or Samples(tuple(each[key] for each in found[side]), unit)

    return [Row(name, *(cell(side, *key) for side in found)) for name, key in keys.items()]


def load(
    folder: Path, device_name: str, precision: str, compile: bool, stage: int, side: str
) -> dict[str, float]:
    """Load one side's stage into this process.

    Returns:
        ``seconds`` of loading; ``host`` and ``weights``, MiB by which the process grew to its peak, and that
        the networks hold; on CUDA ``device``, the most MiB that it held in a generation of two steps.
    """
    case, device = draw_case(folder, stage), torch.device(device_name)
    if side == "stock":
        import_stock(stage, device)  # once before, so that imports are not part of loading
    torch.zeros(1, device=device)  # starts CUDA, likewise
    before, start = forget_peak(), timer()
    options = () if side == "stock" else (precision, compile)
    loaded = (Stock if side == "stock" else Ours)(folder, case, device, *options)
    found = {"seconds": timer() - start, "host": (peak_bytes() - before) / MIB}
    found["weights"] = loaded.weights_bytes() / MIB
    if device.type == "cuda":
        loaded.generate(steps=2)
        found["device"] = torch.cuda.max_memory_allocated(device) / MIB
    return found


# Ours beside ours


def precision_rows(stage: int, options: Options) -> list[Row]:
    """Whole stages in half precision beside fp32."""
    steps = options.steps or options.size.steps[stage]
    name = f"stage {stage}: whole, {steps} steps"

    def measure() -> list[Row]:
        half = options.ours(stage)
        if half.precision == "fp32":
            return _without([name], f"--precision {options.precision} is fp32 here: ask for fp16 or bf16")
        reference = options.ours(stage, "fp32")
        return beside(lambda: reference.generate(steps), {name: lambda: half.generate(steps)}, options)

    return options.measured(stage, [name], measure)


def approximate_rows(stage: int, options: Options) -> list[Row]:
    """The approximate modes, named by the settings that ask for them, beside the exact one."""
    steps = options.steps or PUBLISHED_STEPS[stage]
    modes: list[dict[str, Any]] = []
    if stage == 1:  # DPM-Solver++'s steps where DDIM takes its published ones
        fewer = dict.fromkeys(max(round(each * steps / PUBLISHED_STEPS[1]), 1) for each in (20, 25))
        modes += [{"solver": "dpmpp", "steps": each} for each in fewer]
    modes += [{"guidance_interval": each} for each in _GUIDANCE_INTERVALS[stage]]
    modes += [{"reuse_interval": each} for each in (2, 3)]
    named = {
        f"stage {stage}: " + ", ".join(f"{key}={it}" for key, it in mode.items()): {"steps": steps, **mode}
        for mode in modes
    }

    def measure() -> list[Row]:
        ours = options.ours(stage)
        runs = {name: lambda mode=mode: ours.generate(**mode) for name, mode in named.items()}
        return beside(lambda: ours.generate(steps), runs, options)

    return options.measured(stage, named, measure)


def beside(
    reference: Callable[[], Tensor], runs: dict[str, Callable[[], Tensor]], options: Options
) -> list[Row]:
    """A row for each of the runs, all measured in turn with the reference, and their videos' distances."""
    videos: dict[str, Tensor] = {}

    def timed(name: str, run: Callable[[], Tensor]) -> float:
        options.report(f"{name}: measuring")
        return seconds(lambda: videos.update({name: run()}))

    everything = {"exact": reference, **runs}
    timers = [lambda name=name, run=run: timed(name, run) for name, run in everything.items()]
    expected, *samples = in_turn(timers, options.repeats)
    exact = videos.pop("exact")
    return [
        Row(name, expected, took, relative_difference(videos[name], exact), psnr(videos[name], exact))
        for name, took in zip(runs, samples)
    ]


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||"""
    ours, reference = ours.double().cpu(), reference.double().cpu()
    return ((ours - reference).norm() / reference.norm()).item()


def psnr(video: Tensor, reference: Tensor) -> float:
    """The peak signal-to-noise ratio in dB of videos in about [-1, 1], as they would be shown: in [0, 1]."""
    shown, expected = (((each.double().cpu() + 1) / 2).clamp(0, 1) for each in (video, reference))
    mean_square = (shown - expected).square().mean().item()
    return -10 * math.log10(mean_square) if mean_square else math.inf


def both_stages_row(options: Options) -> Row:
    """The device's peak with both stages in one process, at full speed and with ``low_memory``."""
    name, reason = "both stages: peak device memory", "needs a CUDA device"
    if options.device.type == "cuda":
        reason = prepare(options.folder, 1, options.device) or prepare(options.folder, 2, options.device)
    if reason:
        return Row(name, Missing(reason), Missing(reason))
    return Row(name, *(_mib(options.in_process(generate_both, low)) for low in (False, True)))


def _mib(found: float | Missing) -> Cell:
    return found if isinstance(found, Missing) else Samples((found,), "MiB")


def generate_both(folder: Path, device: str, precision: str, compile: bool, low_memory: bool) -> float:
    """Two steps of each stage, which share the autoencoder; the most MiB that the device held."""
    settings = {"precision": precision, "compile": compile, "low_memory": low_memory}
    pipe = pipeline(TASKS[1], model=str(folder), device=device, **settings)
    pipe(pictures(1)[0], steps=2, refine=True, refine_steps=2)
    return torch.cuda.max_memory_allocated(device) / MIB


# Ours alone


def length_rows(stage: int, options: Options) -> list[list[str]]:
    """The cells of videos of 1, 2 and 4 windows' frames: windows, seconds of a step, and their memory."""
    window = options.size.latents[stage][0]
    lengths = {f"stage {stage}: {factor * window} frames": factor * window for factor in (1, 2, 4)}

    def measure() -> list[Row]:
        peaks = []  # before anything is loaded here: both at once need not fit
        for name, frames in lengths.items():
            options.report(f"{name}: in a new process")
            peaks.append(_mib(options.in_process(denoising_peak, stage, frames)))
        ours = options.ours(stage)

        def step(frames: int) -> float:
            marks = ours.marks(count=_LENGTH_STEPS, frames=frames)
            return (marks[-1] - marks[0]) / (_LENGTH_STEPS - 1)

        runs = [lambda frames=frames: step(frames) for frames in lengths.values()]
        in_turn(runs[:2], 1)  # to warm up: a whole video at once, and windows of one
        return [Row(*each) for each in zip(lengths, in_turn(runs, options.repeats), peaks)]

    cells = []
    for row, frames in zip(options.measured(stage, lengths, measure), lengths.values()):
        parts = frames, window_count(frames, window)
        shares = ["-", "-"]
        if isinstance(row.first, Samples):
            shares = [f"{row.first.median / count:.3g}" for count in parts]
        cells.append([row.name, str(parts[1]), str(row.first), *shares, str(row.second)])
    return cells


def denoising_peak(
    folder: Path, device_name: str, precision: str, compile: bool, stage: int, frames: int
) -> float:
    """The most MiB held while denoising: by a GPU, or by this process beyond what it held once loaded."""
    device = torch.device(device_name)
    ours = Ours(folder, draw_case(folder, stage), device, precision, compile)
    before = 0 if device.type == "cuda" else forget_peak()

    def peak_of_step() -> int:
        if device.type != "cuda":
            peak = peak_bytes()
            forget_peak()
            return peak
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak

    return (max(ours.marks(peak_of_step, _LENGTH_STEPS, frames)[1:]) - before) / MIB
