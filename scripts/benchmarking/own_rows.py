"""Our own whole stages beside each other: approximate modes beside exact, half precision beside fp32."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, Callable, Mapping

import torch
from torch import Tensor

from modelscope_i2v.errors import InvalidInputError, MissingPackageError

from .distances import psnr, relative_difference
from .folders import prepare, read_settings
from .options import OWN_KINDS, Options
from .ours import Ours
from .sizes import PUBLISHED_STEPS, Case, draw_case
from .timing import Missing, OwnRow, Stopwatch, in_rounds

#: DPM-Solver++'s steps where DDIM takes its published ones.
_FEWER_STEPS = (20, 25)
#: In which timesteps there is guidance, by stage: a generation goes from 999, or 599, down to about 0.
_GUIDANCE_INTERVALS = {1: ((0, 800), (200, 800)), 2: ((0, 450), (150, 450))}
_REUSE_INTERVALS = (2, 3)

#: Enough that steps with and without guidance, and with features old and new, have been taken.
_WARM_UP_STEPS = 5


def approximate_modes(stage: int, steps: int) -> list[dict[str, Any]]:
    """A stage's approximate modes, each as a call's keywords, to be measured beside ``steps`` exact steps."""
    modes: list[dict[str, Any]] = []
    if stage == 1:
        share = steps / PUBLISHED_STEPS[1]
        fewer = dict.fromkeys(max(round(each * share), 1) for each in _FEWER_STEPS)
        modes += [{"solver": "dpmpp", "steps": each} for each in fewer]
    modes += [{"guidance_interval": list(each)} for each in _GUIDANCE_INTERVALS[stage]]
    modes += [{"reuse_interval": each} for each in _REUSE_INTERVALS]
    return modes


def mode_name(keywords: Mapping[str, Any]) -> str:
    """As it is asked for in a call."""
    return ", ".join(f"{name}={value}" for name, value in keywords.items())


def own_row_names(stage: int, options: Options) -> dict[str, tuple[str, ...]]:
    """The names of a stage's rows, by kind."""
    steps = options.exact_steps(stage)
    modes = tuple(mode_name(each) for each in approximate_modes(stage, steps))
    precision = f"whole, {options.whole_steps(stage)} steps in {options.our_precision}"
    names = {"precision": (precision,), "approximate": modes}
    return {kind: tuple(f"stage {stage}: {name}" for name in names[kind]) for kind in OWN_KINDS}


def own_rows(stage: int, options: Options, report: Callable[[str], None]) -> dict[str, list[OwnRow]]:
    """A stage's rows by kind, of those kinds that were asked for, each with numbers or a reason for none."""
    settings = read_settings(options.folder, stage)
    names = own_row_names(stage, options)
    kinds = [kind for kind in OWN_KINDS if kind in options.kinds]
    reason = prepare(options.folder, settings, options.device, report) if kinds else ""
    measure = {"precision": _precision_row, "approximate": _approximate_rows}
    rows = {}
    for kind in kinds:
        if not reason:
            try:
                rows[kind] = measure[kind](draw_case(stage, settings), options, names[kind], report)
            except (torch.cuda.OutOfMemoryError, MemoryError, MissingPackageError) as error:
                rows[kind] = _missing(names[kind], str(error).partition(". ")[0])
            gc.collect()
        else:
            rows[kind] = _missing(names[kind], reason)
    return rows


def _missing(names: tuple[str, ...], reason: str) -> list[OwnRow]:
    return [OwnRow(name, Missing(reason), Missing(reason)) for name in names]


@dataclass
class _Generation:
    """A whole stage. A call gives its seconds, and the video is kept."""

    side: Ours
    keywords: dict[str, Any]
    video: Tensor | None = None

    def __call__(self) -> float:
        watch = Stopwatch(self.side.device)
        watch.start()
        self.video = self.side.generate(**self.keywords)
        watch.stop()
        return watch.seconds

    def warm_up(self) -> None:
        """Whatever is done once only."""
        self.side.generate(**{**self.keywords, "steps": min(self.keywords["steps"], _WARM_UP_STEPS)})


def _precision_row(
    case: Case, options: Options, names: tuple[str, ...], report: Callable[[str], None]
) -> list[OwnRow]:
    if options.our_precision == "fp32":
        reason = f"--precision {options.precision} is fp32 here: ask for fp16 or bf16"
        return _missing(names, reason)
    keywords = {"steps": options.whole_steps(case.stage)}
    report(f"stage {case.stage}: loading ours in fp32 and in {options.our_precision}")
    reference, half = (
        _Generation(Ours(options.folder, case, options.device, precision, options.compile), keywords)
        for precision in ("fp32", options.our_precision)
    )
    return _beside(reference, {names[0]: half}, options.repeats, report)


def _approximate_rows(
    case: Case, options: Options, names: tuple[str, ...], report: Callable[[str], None]
) -> list[OwnRow]:
    report(f"stage {case.stage}: loading ours")
    ours = Ours(options.folder, case, options.device, options.precision, options.compile)
    exact = {"steps": options.exact_steps(case.stage)}
    modes = approximate_modes(case.stage, exact["steps"])
    others = {name: {**exact, **mode} for name, mode in zip(names, modes)}
    return generations_beside(ours, exact, others, options.repeats, report)


def generations_beside(
    ours: Ours,
    exact: dict[str, Any],
    others: dict[str, dict[str, Any]],
    repeats: int,
    report: Callable[[str], None],
) -> list[OwnRow]:
    """Rows, by their names, of generations with other keywords than the exact one's."""
    generations = {name: _Generation(ours, keywords) for name, keywords in others.items()}
    return _beside(_Generation(ours, exact), generations, repeats, report)


def _beside(
    reference: _Generation,
    others: dict[str, _Generation],
    repeats: int,
    report: Callable[[str], None],
) -> list[OwnRow]:
    """One row for each of the others, all measured in turn with the reference."""
    reference.warm_up()
    refused: dict[str, Missing] = {}
    for name, other in others.items():
        report(f"{name}: measuring")
        try:
            other.warm_up()
        except InvalidInputError as error:
            refused[name] = Missing(str(error))
    measured = {name: other for name, other in others.items() if name not in refused}
    expected, *samples = in_rounds([reference, *measured.values()], repeats)
    found = dict(zip(measured, samples))
    rows = []
    for name, other in others.items():
        if name in refused:
            rows.append(OwnRow(name, expected, refused[name]))
        else:
            distances = [measure(other.video, reference.video) for measure in (relative_difference, psnr)]
            rows.append(OwnRow(name, expected, found[name], *distances))
    return rows
