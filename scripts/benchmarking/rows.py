"""The rows that have the stock beside ours: what each measures, and that both sides compute the same."""

from __future__ import annotations

import gc
from typing import Callable, Iterable

import torch

from modelscope_i2v.errors import MissingPackageError

from .distances import relative_difference
from .folders import prepare, read_settings
from .fresh import ProcessFailed
from .loading import SIDES, load_in_fresh_process
from .operations import StepProfile
from .options import STOCK_KINDS, Options
from .ours import Ours
from .sizes import STAGE_NAMES, Case, draw_case
from .stock import Stock
from .timing import Missing, Row, Samples, Stopwatch, in_turn, timed

#: Those that both sides compute in one process.
COMPUTED = STOCK_KINDS[:4]
#: Has a row where ours is compiled.
COMPILING = "compiling"

#: The largest relative difference of two float32 sides.
TOLERANCE = 1e-4

#: For the check: it passes both branches of guidance through the whole UNet twice or thrice.
_CHECKED_STEPS = 2


class DisagreementError(RuntimeError):
    """The two sides compute different things, so that their times cannot be compared."""


def row_names(stage: int, options: Options) -> dict[str, tuple[str, ...]]:
    """The names of a stage's rows, by kind."""
    names = {
        "step": ("one guided step",),
        "encode": ("VAE encode",) if stage == 2 else (),
        "decode": ("VAE decode",),
        "stage": (f"whole, {options.whole_steps(stage)} steps",),
        "loading": ("loading, seconds", "loading, peak host memory", "loading, weights in use"),
        "memory": ("peak device memory",),
        COMPILING: ("compiling",) if options.compile else (),
    }
    return {kind: tuple(f"stage {stage}: {name}" for name in named) for kind, named in names.items()}


def stage_rows(stage: int, options: Options, report: Callable[[str], None]) -> list[Row]:
    """The rows of a stage that were asked for, each with numbers or with a reason why it has none.

    Args:
        stage: 1 or 2.
        options: what is measured.
        report: takes lines on what is going on, and the profile.

    Raises:
        DisagreementError: the sides' outputs differ.
    """
    settings = read_settings(options.folder, stage)
    names = row_names(stage, options)
    kinds, on_cuda = set(options.kinds), options.device.type == "cuda"
    if set(COMPUTED) & kinds:
        kinds.add(COMPILING)
    wanted = [name for kind in names if kind in kinds for name in names[kind]]
    reason = prepare(options.folder, settings, options.device, report) if wanted or options.profile else ""
    if reason:
        return _missing(wanted, reason)
    rows = [] if on_cuda else _missing(names["memory"], "needs a CUDA device")
    if "loading" in kinds or ("memory" in kinds and on_cuda):
        rows += _process_rows(stage, options, names, report)
    if set(COMPUTED) & kinds or options.profile:
        try:
            rows += _compute_rows(draw_case(stage, settings), options, names, report)
        except (torch.cuda.OutOfMemoryError, MemoryError, MissingPackageError) as error:
            computed = (name for kind in (*COMPUTED, COMPILING) for name in names[kind])
            rows += _missing(computed, str(error).partition(". ")[0])
    found = {row.name: row for row in rows}
    return [found[name] for name in wanted]


def _missing(names: Iterable[str], reason: str) -> list[Row]:
    return [Row(name, Missing(reason), Missing(reason)) for name in names]


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
            arguments = options.folder, stage, options.device, options.precision, options.compile
            try:
                measured[side].append(load_in_fresh_process(side, *arguments))
            except ProcessFailed as error:
                failed[side] = Missing(str(error))

    def row(name: str, key: str, unit: str) -> Row:
        cells = [
            failed.get(side) or Samples(tuple(each[key] for each in measured[side]), unit) for side in SIDES
        ]
        return Row(name, *cells)

    seconds, host, weights = names["loading"]
    rows = [
        row(seconds, "seconds", "s"), row(host, "host_mib", "MiB"), row(weights, "weights_mib", "MiB")
    ]  # fmt: skip
    if options.device.type == "cuda":
        rows += [row(name, "device_mib", "MiB") for name in names["memory"]]
    return rows


def _compute_rows(
    case: Case, options: Options, names: dict[str, tuple[str, ...]], report: Callable[[str], None]
) -> list[Row]:
    """The rows that both sides compute in this process."""
    report(f"stage {case.stage}: loading both sides")
    ours = Ours(options.folder, case, options.device, options.precision, options.compile)
    rows = [_compiling_row(name, ours) for name in names[COMPILING]]
    try:
        stock: Stock | None = Stock(options.folder, case, options.device)
        why_not = ""
    except (ImportError, AttributeError) as error:
        stock, why_not = None, f"the installed modelscope's cannot be used: {error}"
    report(f"stage {case.stage}: comparing the outputs")
    differences = compare(stock, ours, options.kinds) if stock else {}
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


def _compiling_row(name: str, ours: Ours) -> Row:
    """What the first short generation takes longer than the second."""
    first, second = (timed(lambda: ours.generate(_CHECKED_STEPS), ours.device) for _ in range(2))
    return Row(name, Missing("is not compiled"), Samples((max(first - second, 0.0),)))


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
        "stage": lambda: side.generate(steps=options.whole_steps(case.stage)),
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


def _profile(side: Stock | Ours, case: Case, device: torch.device) -> str:
    profile = StepProfile(device)
    side.step(profile)
    return profile.table(f"stage {case.stage}, one guided step, {type(side).__name__.lower()}")
