"""The rows of the table, stage by stage: what each measures, and that both sides compute the same."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable

import torch

from .folders import lacks_disk, parameters, read_settings, write_weights
from .loading import SIDES, LoadingFailed, load_in_fresh_process
from .operations import StepProfile
from .ours import Ours
from .sizes import STAGE_NAMES, Case, Size, draw_case
from .stock import Stock
from .timing import Missing, Row, Samples, Stopwatch, in_turn, timed

#: The kinds of rows, in the table's order.
KINDS = ("step", "encode", "decode", "stage", "loading", "memory")
#: Those that both sides compute in one process.
COMPUTED = KINDS[:4]

#: The largest relative difference of two float32 sides.
TOLERANCE = 1e-4

#: For the check: it passes both branches of guidance through the whole UNet twice or thrice.
_CHECKED_STEPS = 2


class DisagreementError(RuntimeError):
    """The two sides compute different things, so that their times cannot be compared."""


@dataclass(frozen=True)
class Options:
    """What is asked for on the command line."""

    size: Size
    device: torch.device
    precision: str
    repeats: int
    kinds: tuple[str, ...]
    folder: Path
    profile: bool = False


def row_names(stage: int, size: Size) -> dict[str, tuple[str, ...]]:
    """The names of a stage's rows, by kind."""
    names = {
        "step": ("one guided step",),
        "encode": ("VAE encode",) if stage == 2 else (),
        "decode": ("VAE decode",),
        "stage": (f"whole, {size.steps[stage]} steps",),
        "loading": ("loading, seconds", "loading, peak host memory"),
        "memory": ("peak device memory",),
    }
    return {kind: tuple(f"stage {stage}: {name}" for name in named) for kind, named in names.items()}


def stage_rows(stage: int, options: Options, report: Callable[[str], None]) -> list[Row]:
    """All rows of a stage that were asked for, each with numbers or with a reason why it has none.

    Args:
        stage: 1 or 2.
        options: what is measured.
        report: takes lines on what is going on, and the profile.

    Raises:
        DisagreementError: the sides' outputs differ.
    """
    settings = read_settings(options.folder, stage)
    names = row_names(stage, options.size)
    wanted = [name for kind in KINDS if kind in options.kinds for name in names[kind]]
    reason = lacks_disk(options.folder, settings) or _lacks_memory(settings, options.device)
    if reason:
        return _missing(wanted, reason)
    report(f"stage {stage}: writing weights into {options.folder}")
    write_weights(options.folder, settings)
    kinds, on_cuda = set(options.kinds), options.device.type == "cuda"
    rows = [] if on_cuda else _missing(names["memory"], "needs a CUDA device")
    if "loading" in kinds or ("memory" in kinds and on_cuda):
        rows += _process_rows(stage, options, names, report)
    if set(COMPUTED) & kinds or options.profile:
        try:
            rows += _compute_rows(draw_case(stage, settings), options, names, report)
        except torch.cuda.OutOfMemoryError as error:
            computed = (name for kind in COMPUTED for name in names[kind])
            rows += _missing(computed, str(error).partition(". ")[0])
    found = {row.name: row for row in rows}
    return [found[name] for name in wanted]


def _missing(names: Iterable[str], reason: str) -> list[Row]:
    return [Row(name, Missing(reason), Missing(reason)) for name in names]


def _lacks_memory(settings: object, device: torch.device) -> str:
    """Why both sides do not fit into this machine's memory, or nothing. Where it cannot be told: nothing."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return ""
    # Both sides' weights, and the largest file read beside them: about three times the UNet.
    needed = 3.3 * 4 * max(parameters(settings).values()) if device.type == "cpu" else 0
    if needed < free:
        return ""
    return f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"


def _process_rows(
    stage: int, options: Options, names: dict[str, tuple[str, ...]], report: Callable[[str], None]
) -> list[Row]:
    """Loading's and the device's rows, from processes of their own, in turn."""
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    failed: dict[str, Missing] = {}
    for repeat in range(options.repeats):
        for side in SIDES:
            if side in failed:
                continue
            report(f"stage {stage}: loading {side} in a new process, {repeat + 1} of {options.repeats}")
            arguments = options.folder, stage, options.device, options.precision
            try:
                measured[side].append(load_in_fresh_process(side, *arguments))
            except LoadingFailed as error:
                failed[side] = Missing(str(error))

    def row(name: str, key: str, unit: str) -> Row:
        cells = [
            failed.get(side) or Samples(tuple(each[key] for each in measured[side]), unit) for side in SIDES
        ]
        return Row(name, *cells)

    seconds, host = names["loading"]
    rows = [row(seconds, "seconds", "s"), row(host, "host_mib", "MiB")]
    if options.device.type == "cuda":
        rows += [row(name, "device_mib", "MiB") for name in names["memory"]]
    return rows


def _compute_rows(
    case: Case, options: Options, names: dict[str, tuple[str, ...]], report: Callable[[str], None]
) -> list[Row]:
    """The rows that both sides compute in this process."""
    report(f"stage {case.stage}: loading both sides")
    ours = Ours(options.folder, case, options.device, options.precision)
    try:
        stock: Stock | None = Stock(options.folder, case, options.device)
        why_not = ""
    except (ImportError, AttributeError) as error:
        stock, why_not = None, f"the installed modelscope's cannot be used: {error}"
    report(f"stage {case.stage}: comparing the outputs")
    differences = compare(stock, ours, options.kinds) if stock else {}
    rows = []
    for kind in (kind for kind in COMPUTED if kind in options.kinds):
        for name in names[kind]:
            report(f"{name}: measuring")
            runs = [_measurement(kind, side, case, options) for side in (stock, ours) if side]
            if stock:
                samples = in_turn(runs[0], runs[1], options.repeats, warm_up=kind != "stage")
                rows.append(Row(name, *samples, differences[kind]))
            else:
                alone = in_turn(lambda: 0.0, runs[0], options.repeats)[1]
                rows.append(Row(name, Missing(why_not), alone))
    if options.profile:
        for side in (stock, ours):
            if side:
                report(_profile(side, case, options.device))
    del stock, ours
    gc.collect()
    return rows


def _measurement(kind: str, side: Stock | Ours, case: Case, options: Options) -> Callable[[], float]:
    """What does a row's work once on one side, and returns its seconds."""
    if kind == "step":

        def step() -> float:
            watch = Stopwatch(options.device)
            side.step(watch)
            return watch.seconds

        return step
    work = {
        "encode": side.encode,
        "decode": side.decode,
        "stage": lambda: side.generate(options.size.steps[case.stage]),
    }[kind]
    return lambda: timed(work, options.device)


def compare(stock: Stock, ours: Ours, kinds: Iterable[str]) -> dict[str, float]:
    """The relative differences of the sides' outputs, by kind of row.

    Raises:
        DisagreementError: both are in float32, and one is above ``TOLERANCE``.
    """
    outputs = {
        "step": lambda side: side.velocity(500),
        "encode": lambda side: side.encode(),
        "decode": lambda side: side.decode(),
        # The deterministic sampler of stage two: its other one's noise hangs on the last bit of a logarithm.
        "stage": lambda side: side.generate(_CHECKED_STEPS, "normal"),
    }
    differences = {}
    for kind in kinds:
        if kind not in outputs or (kind == "encode" and ours.case.stage == 1):
            continue
        difference = relative_difference(outputs[kind](ours), outputs[kind](stock))
        # Written so that a difference that is not a number is refused, too.
        if stock.precision == ours.precision == "fp32" and not difference < TOLERANCE:
            raise DisagreementError(
                f"{STAGE_NAMES[ours.case.stage]}, {kind}: the outputs of the two sides differ by "
                f"{difference:.1e}, allowed is {TOLERANCE:.0e}: there is nothing to compare"
            )
        differences[kind] = difference
    return differences


def relative_difference(ours: torch.Tensor, stock: torch.Tensor) -> float:
    """||ours - stock|| / ||stock||"""
    ours, stock = ours.double().cpu(), stock.double().cpu()
    return ((ours - stock).norm() / stock.norm()).item()


def _profile(side: Stock | Ours, case: Case, device: torch.device) -> str:
    profile = StepProfile(device)
    side.step(profile)
    return profile.table(f"stage {case.stage}, one guided step, {type(side).__name__.lower()}")
