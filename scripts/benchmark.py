"""This package's speed and memory beside the stock implementation's: ``python scripts/benchmark.py --help``.

What is measured and how it is read is in ``docs/benchmarks.md``; the parts are in ``benchmarking/``.
"""

from __future__ import annotations

import argparse
import logging
import platform
import re
import sys
import tempfile
import warnings
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import ContextManager, Sequence

import torch

# This checkout is what is measured, whether it is installed or not.
SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]

from benchmarking import rows as measure  # noqa: E402
from benchmarking.cases import SIZES, size_named, write_configuration  # noqa: E402
from benchmarking.measuring import Row  # noqa: E402
from benchmarking.stock import import_stock  # noqa: E402
from benchmarking.training import training_rows  # noqa: E402

from modelscope_i2v import __version__  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """All options, with what each is for."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description="A table of this package's speed and memory beside those of the stock implementation "
        "inside the installed modelscope, measured in turn in one process, with the same random weights; "
        "and tables of its own precisions and approximate modes beside each other.",
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="tiny: to try the benchmark itself; small (default): "
        "minutes on two cores; full: the published networks, on a CPU with less video")  # fmt: skip
    add("--device", type=_device, default="auto", help="cpu, cuda, cuda:1, ...; auto: CUDA where it is")
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto",
        help="ours; the stock: float32 on a CPU, autocast to float16 on CUDA, as published")  # fmt: skip
    add("--stage", choices=("1", "2", "both"), default="both")
    add("--repeats", type=_positive, default=3, help="measurements of each side of a row (3)")
    add("--steps", type=_positive, help="of a whole stage (default: the published 50 and 30 at size full on "
        "a GPU and for the approximate modes, elsewhere 2)")  # fmt: skip
    add("--compile", action="store_true", help="ours with the setting compile")
    add("--threads", type=_positive, help="of a CPU (default: torch's own choice)")
    add("--rows", type=_kinds, default=measure.DEFAULT_KINDS, metavar="KIND,...",
        help=f"only these: {', '.join(measure.KINDS)}; all (default: all but the last three)")  # fmt: skip
    add("--folder", type=Path, help="keep the weights here, and use those that are here (default: a "
        "temporary folder); full writes 15 GB for one stage, 21 GB for both")  # fmt: skip
    add("--profile", action="store_true", help="also print torch's profile of one guided step of each side")
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, got {text}")
    return int(text)


def _kinds(text: str) -> tuple[str, ...]:
    kinds = measure.KINDS if text == "all" else tuple(text.split(","))
    for kind in kinds:
        if kind not in measure.KINDS:
            raise argparse.ArgumentTypeError(f"got {kind!r}, allowed are {', '.join(measure.KINDS)}; all")
    return kinds


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)  # whose work torch's timer waits for
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError("only CPUs and CUDA devices are measured")
    return device


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the tables. Returns the exit status: 1 if the two sides do not agree."""
    given = build_parser().parse_args(argv)
    torch.set_num_threads(given.threads or torch.get_num_threads())
    logging.disable(logging.INFO)
    temporary: ContextManager = (
        nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory(prefix="benchmark-")
    )
    with temporary as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchsde")  # of the stock sampler's noise
        options = measure.Options(
            size=size_named(given.size, given.device),
            folder=Path(folder).resolve() / given.size,
            device=given.device,
            report=lambda line: print(line, file=sys.stderr, flush=True),
            precision=given.precision,
            repeats=given.repeats,
            kinds=given.rows,
            steps=given.steps,
            compile=given.compile,
            profile=given.profile,
        )
        write_configuration(options.folder, options.size)
        try:
            text = tables(options, (1, 2) if given.stage == "both" else (int(given.stage),))
        except measure.DisagreementError as error:
            print(f"benchmark.py: {error}", file=sys.stderr)
            return 1
        finally:
            logging.disable(logging.NOTSET)
    print(text)
    return 0


def tables(options: measure.Options, stages: Sequence[int]) -> str:
    """Measure; what it was measured on, and a table for each sort of row that was asked for."""
    kinds, computed = options.kinds, options.precision + (", compiled" if options.compile else "")
    stock = "fp16 autocast" if options.device.type == "cuda" else "fp32"
    parts = [conditions(options, stages)]
    rows = [row for stage in stages for row in measure.stock_rows(stage, options)]
    parts.append(table(["", f"stock ({stock})", f"ours ({computed})", "stock / ours"], rows))
    if "precision" in kinds:
        rows = [row for stage in stages for row in measure.precision_rows(stage, options)]
        parts.append(table(["ours, half precision", "fp32", computed, "gain"], rows))
    if "approximate" in kinds:
        rows = [row for stage in stages for row in measure.approximate_rows(stage, options)]
        parts.append(table([f"ours, approximate modes ({computed})", "exact", "approximate", "gain"], rows))
    if "memory" in kinds and len(stages) == 2:
        row = measure.both_stages_row(options)
        parts.append(table([f"ours, both stages ({computed})", "full speed", "low_memory", "gain"], [row]))
    if "length" in kinds:
        memory = "peak device memory" if options.device.type == "cuda" else "peak growth of the process"
        titles = [f"ours, one step ({computed})", "windows", "seconds", "s / frame", "s / window", memory]
        cells = [line for stage in stages for line in measure.length_rows(stage, options)]
        parts.append(padded([titles, *cells]))
    if "training" in kinds:
        memory = "peak device memory" if options.device.type == "cuda" else "peak growth of the process"
        titles = [f"training, one step of one clip ({options.precision})", "seconds", memory]
        cells = [line for stage in stages for line in training_rows(stage, options)]
        parts.append(padded([titles, *cells]))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(titles: list[str], rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; nothing, if there are none."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    cells = [[*titles, "difference", "PSNR, dB"]]
    for row in rows:
        numbers = number(row.ratio, ".2f"), number(row.difference, ".1e"), number(row.psnr, ".1f")
        cells.append([row.name, str(row.first), str(row.second), *numbers])
    if all(row.psnr is None for row in rows):
        cells = [line[:-1] for line in cells]
    return padded(cells) if rows else ""


def padded(cells: list[list[str]]) -> str:
    """A Markdown table that reads well as it is."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(line, widths)) for line in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def conditions(options: measure.Options, stages: Sequence[int]) -> str:
    """What the rows were measured on and with, as a Markdown list."""
    versions = [f"Python {platform.python_version()}", f"modelscope_i2v {__version__}"]
    versions += [f"{name} {version(name)}" for name in ("torch", "modelscope", "open_clip_torch")]
    lines = [f"device: {_device_in_words(options.device)}", f"versions: {', '.join(versions)}"]
    for stage in stages:
        shape = " x ".join(map(str, options.size.latents[stage]))
        lines.append(f"stage {stage}: size {options.size.name}: latent {shape}, random weights")
    if set(measure.STOCK_KINDS) & set(options.kinds):
        try:
            stand_ins = ", ".join(import_stock(stages[0], options.device).substituted) or "none"
        except (ImportError, AttributeError) as error:
            stand_ins = f"none; {error}"
        lines.append(f"stand-ins in the stock (for xformers, torch's own attention): {stand_ins}")
    lines.append(f"medians (and smallest to largest) of {options.repeats}, the sides of a row in turn")
    return "\n".join(f"- {line}" for line in lines)


def _device_in_words(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    names = re.findall(r"model name\s*:\s*(.+)", text) or [platform.processor() or platform.machine()]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return ", ".join([names[0], f"threads: {torch.get_num_threads()}", *flags])


if __name__ == "__main__":
    sys.exit(main())
