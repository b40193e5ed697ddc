"""The command line."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Sequence

import torch

from modelscope_i2v.settings.configuration import PRECISION_CHOICES

from .both_stages import both_stages_row
from .folders import write_configuration
from .lengths import length_rows
from .options import DEFAULT_KINDS, KINDS, LENGTH, Options
from .own_rows import own_rows
from .report import both_stages_table, conditions, length_table, own_tables, precisions, table
from .rows import DisagreementError, stage_rows
from .sizes import SIZE_NAMES, size_named
from .timing import OwnRow


def build_parser() -> argparse.ArgumentParser:
    """All options, with what each is for."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description="A table of this package's speed and memory beside those of the stock implementation "
        "inside the installed modelscope, measured in turn in one process, with the same random weights; "
        "and tables of its own precisions and approximate modes beside each other.",
    )
    parser.add_argument(
        "--size", choices=SIZE_NAMES, default="small",
        help="tiny: to try the benchmark itself; small: minutes on two cores; full: the published networks, "
        "on a CPU with less video (default: small)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: CUDA where it is")
    parser.add_argument(
        "--precision", choices=PRECISION_CHOICES, default="auto",
        help="ours; the stock computes as published: float32 on a CPU, autocast to float16 on CUDA",
    )  # fmt: skip
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both")
    parser.add_argument(
        "--repeats", type=_positive, default=3, help="measurements of each side of a row (default: 3)"
    )
    parser.add_argument(
        "--steps", type=_positive,
        help="of rows that measure a whole stage (default: the published 50 and 30 at size full on a GPU and "
        "of the approximate modes' rows, elsewhere and of lengths 2)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="ours with the setting compile")
    parser.add_argument("--threads", type=_positive, help="of a CPU (default: torch's own choice)")
    parser.add_argument(
        "--rows", type=_kinds, default=DEFAULT_KINDS, metavar="KIND,...",
        help=f"only these kinds of rows: {', '.join(KINDS)}; all (default: all but approximate and length)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path,
        help="keep the weights here, and use those that are here (default: a temporary folder); "
        "full writes 15 GB for one, 21 GB for both",
    )  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table into this file")
    parser.add_argument(
        "--profile", action="store_true", help="also print where a step's time goes, by kind of operation"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, got {value}")
    return value


def _kinds(text: str) -> tuple[str, ...]:
    if text == "all":
        return KINDS
    kinds = tuple(text.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"got {kind!r}, allowed are {', '.join(KINDS)}; all")
    return kinds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table. Returns the exit status: 1 if the two sides do not agree."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        device = _device(arguments.device)
    except (RuntimeError, ValueError) as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    stages = (1, 2) if arguments.stage == "both" else (int(arguments.stage),)
    with _threads(arguments.threads), _quiet(), _working_folder(arguments.folder, arguments.size) as folder:
        options = Options(
            size=size_named(arguments.size, device),
            device=device,
            precision=arguments.precision,
            repeats=arguments.repeats,
            kinds=arguments.rows,
            folder=folder,
            profile=arguments.profile,
            compile=arguments.compile,
            steps=arguments.steps,
        )
        write_configuration(folder, options.size)
        try:
            text = _tables(options, stages)
        except DisagreementError as error:
            print(f"benchmark.py: {error}", file=sys.stderr)
            return 1
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    return 0


def _tables(options: Options, stages: Sequence[int]) -> str:
    """Measure; what it was measured on, and a table for each sort of row that was asked for."""
    rows = [row for stage in stages for row in stage_rows(stage, options, _report)]
    own: dict[str, list[OwnRow]] = {}
    for stage in stages:
        for kind, found in own_rows(stage, options, _report).items():
            own.setdefault(kind, []).extend(found)
    parts = [conditions(options, stages), table(rows, *precisions(options)) if rows else ""]
    parts.append(own_tables(own, options))
    if "memory" in options.kinds and len(stages) == 2:
        parts.append(both_stages_table(both_stages_row(options, _report), options))
    if LENGTH in options.kinds:
        lengths = [row for stage in stages for row in length_rows(stage, options, _report)]
        parts.append(length_table(lengths, options))
    return "\n\n".join(part for part in parts if part) + "\n"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError("only CPUs and CUDA devices are measured")
    if device.type == "cuda":
        torch.cuda.get_device_properties(device)
        device = torch.device("cuda", device.index or 0)
    return device


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch's number of threads, as given."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without either side's log, and without the warnings of the stock sampler's noise."""
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchsde")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _working_folder(given: Path | None, size: str) -> Iterator[Path]:
    """Where the weights are: the given folder's part for this size, or a temporary one."""
    if given is not None:
        folder = given / size
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="modelscope_i2v-benchmark-") as folder:
        yield Path(folder)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
