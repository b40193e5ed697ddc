"""The table as text, and what it was measured on."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Mapping, Sequence

import torch

import modelscope_i2v

from .folders import parameters, read_settings
from .lengths import LengthRow
from .options import OWN_KINDS, STOCK_KINDS, Options
from .stock import import_stock
from .timing import OwnRow, Row


def table(rows: Sequence[Row], stock_precision: str, our_precision: str) -> str:
    """The rows as a Markdown table, padded so that it reads well as it is."""
    titles = ["", f"stock ({stock_precision})", f"ours ({our_precision})", "stock / ours", "difference"]
    cells = [
        [row.name, str(row.stock), str(row.ours), _number(row.ratio, ".2f"), _number(row.difference, ".1e")]
        for row in rows
    ]
    return _padded([titles, *cells])


def own_table(rows: Sequence[OwnRow], title: str, reference: str, measured: str) -> str:
    """Likewise, of rows that have ours on both sides."""
    titles = [title, reference, measured, "gain", "difference", "PSNR, dB"]
    cells = []
    for row in rows:
        numbers = [_number(row.gain, ".2f"), _number(row.difference, ".1e"), _number(row.psnr, ".1f")]
        cells.append([row.name, str(row.reference), str(row.measured), *numbers])
    return _padded([titles, *cells])


def own_tables(rows: Mapping[str, Sequence[OwnRow]], options: Options) -> str:
    """A table for each kind of such rows that was asked for."""
    columns = {
        "precision": ("ours, half precision", "fp32", options.our_precision),
        "approximate": (f"ours, approximate modes ({options.our_precision})", "exact", "approximate"),
    }
    return "\n\n".join(own_table(rows[kind], *columns[kind]) for kind in OWN_KINDS if rows.get(kind))


def both_stages_table(row: OwnRow, options: Options) -> str:
    """A table of one row, of both stages in one process."""
    return own_table([row], f"ours, both stages ({precisions(options)[1]})", "full speed", "low_memory")


def length_table(rows: Sequence[LengthRow], options: Options) -> str:
    """The rows of lengths, with the medians' shares of a frame and of a window beside them."""
    title = f"ours, denoising, {options.length_steps} steps ({precisions(options)[1]})"
    memory = "peak device memory" if options.device.type == "cuda" else "peak growth of the process"
    titles = [title, "windows", "seconds", "s / frame", "s / window", memory]
    cells = []
    for row in rows:
        shares = [_number(row.seconds_per(count), ".3g") for count in (row.frames, row.windows)]
        cells.append([row.name, str(row.windows), str(row.seconds), *shares, str(row.peak)])
    return _padded([titles, *cells])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _padded(cells: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    padded = [[text.ljust(width) for text, width in zip(line, widths)] for line in cells]
    lines = [f"| {' | '.join(line)} |" for line in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def precisions(options: Options) -> tuple[str, str]:
    """What the two sides compute in."""
    stock = "fp16 autocast" if options.device.type == "cuda" else "fp32"
    return stock, f"{options.our_precision}{', compiled' if options.compile else ''}"


def conditions(options: Options, stages: Sequence[int]) -> str:
    """What the rows were measured on and with, as a Markdown list."""
    lines = [f"device: {_device(options.device)}", f"versions: {_versions()}"]
    for stage in stages:
        lines.append(f"stage {stage}: {_sizes(options, stage)}")
    if set(STOCK_KINDS) & set(options.kinds):
        lines.append(f"stand-ins in the stock: {_stand_ins(options, stages[0])}")
    lines.append(f"medians (and smallest to largest) of {options.repeats}, the sides of a row in turn")
    return "\n".join(f"- {line}" for line in lines)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:(.+)", text)
    held = flags[1].split() if flags else []
    found = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in held]
    return ", ".join([model[1] if model else name, f"threads: {torch.get_num_threads()}", *found])


def _versions() -> str:
    versions = {"modelscope_i2v": modelscope_i2v.__version__, "Python": platform.python_version()}
    for package in ("torch", "modelscope", "open_clip_torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "?"
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _sizes(options: Options, stage: int) -> str:
    settings = read_settings(options.folder, stage)
    counts = parameters(settings)
    millions = ", ".join(
        f"{name} {counts[file] / 1e6:.0f} M"
        for name, file in (
            ("UNet", settings.ckpt_unet), ("VAE", settings.ckpt_autoencoder), ("CLIP", settings.ckpt_clip)
        )
    )  # fmt: skip
    width, height = settings.frame_size
    latent = f"{settings.max_frames} x {settings.latent_hei} x {settings.latent_wid}"
    return f"size {options.size.name}: latent {latent}, {width}x{height} pixels, random weights: {millions}"


def _stand_ins(options: Options, stage: int) -> str:
    try:
        substituted = import_stock(stage, options.device).substituted
    except (ImportError, AttributeError) as error:
        return f"none; {error}"
    if "xformers" not in substituted:
        return (
            f"for {', '.join(substituted) or 'nothing'} (xformers {importlib.metadata.version('xformers')})"
        )
    return f"for {', '.join(substituted)} (xformers' attention is torch's scaled_dot_product_attention here)"
