"""``modelscope-i2v batch``: videos of many images and videos, resumable, in one process or on a cluster."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from typing import Any, Callable, Mapping

from ..errors import I2VError, InvalidInputError
from ..settings.stages import IMAGE_TO_VIDEO, VIDEO_TO_VIDEO
from .command import Command, echo
from .flags import (
    PROGRESS,
    add_flags,
    add_loading_flags,
    add_second_stage_flags,
    first_stage_flags,
    loading_values,
    second_stage_values,
    values_of,
)
from .stages import HUB_ID_IMAGE_TO_VIDEO, HUB_ID_VIDEO_TO_VIDEO, StageRun, default_refine_model


def _add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="images and videos: paths, URLs, folders, and .jsonl "
        'lists, a line such as {"image": "cat.png", "output": "cat.mp4", "seed": 7} for each')  # fmt: skip
    add("-o", "--output", required=True, metavar="FOLDER",
        help="for the videos and results.jsonl; with those of an earlier run, go on with it")  # fmt: skip
    add("--model", default=HUB_ID_IMAGE_TO_VIDEO, metavar="DIR_OR_ID",
        help="stage one's folder, or its id on the hub (default: %(default)s)")  # fmt: skip
    add("--by-stage", action="store_true",
        help="stage one of all items before stage two of all, each model loaded by itself")  # fmt: skip
    add("--score", action="store_true", help="write scores of the videos into results.jsonl")
    add("--ray", nargs="?", const="", metavar="ADDRESS",
        help="work on a Ray cluster: auto or HOST:PORT (default: one of its own, here)")  # fmt: skip
    add("--workers", type=int, metavar="N",
        help="with --ray: how many (default: one for each GPU, or as many as there is room for)")  # fmt: skip
    add("--cpus", type=int, metavar="N",
        help="with --ray and without GPUs: CPUs of each worker (default: all of a node)")  # fmt: skip
    add_loading_flags(parser)
    add_flags(parser, first_stage_flags())
    refine = parser.add_argument_group("stage two: of videos, and of images with --refine")
    refine.add_argument("--refine", nargs="?", const="", metavar="DIR_OR_ID",
        help="run it on images, too, of this folder or id on the hub (default: stage one's folder if it "
        f"describes both stages, else {HUB_ID_VIDEO_TO_VIDEO})")  # fmt: skip
    add_second_stage_flags(refine)


def _batch(arguments: argparse.Namespace) -> None:
    from ..media.video import check_writable

    _check_ray_flags(arguments)
    first = [each for each in first_stage_flags() if each != PROGRESS]
    keywords = {**values_of(arguments, first), **second_stage_values(arguments)}

    from ..batch.items import read_items

    items = read_items(arguments.inputs, arguments.output, keywords, arguments.refine is not None)
    for output in {os.path.join(arguments.output, os.path.basename(item.output)) for item in items}:
        check_writable(output)
    folders = _checked_folders(arguments, items)

    from ..batch.making import Models, Options
    from ..batch.running import run_batch

    models = Models(folders, loading_values(arguments))
    options = Options(arguments.by_stage, arguments.score, arguments.progress)
    report = _reporter(arguments.output)
    with ExitStack() as stack:
        workers = None
        if arguments.ray is not None:
            from ..batch.ray_workers import connected, ray_workers

            ray = stack.enter_context(connected(arguments.ray))
            workers = ray_workers(ray, arguments.output, models, options, arguments.workers, arguments.cpus)
        counts = run_batch(items, arguments.output, models, options, report, workers)
    words = f"{len(items)} items: {counts.made} made, {counts.found} finished before, {counts.failed} failed"
    echo(f"{arguments.output}: {words}")
    if counts.failed:
        results = os.path.join(arguments.output, "results.jsonl")
        raise I2VError(f"{counts.failed} of {len(items)} items failed: see {results}")


def _reporter(folder: str) -> Callable[[Mapping[str, Any], bool], None]:
    """Return what prints a line for each item, above the bar."""
    from tqdm.auto import tqdm

    def report(entry: Mapping[str, Any], made: bool) -> None:
        path = os.path.join(folder, entry["output"])
        if entry["status"] == "failed":
            tqdm.write(f"{path}: {entry['error']}", file=sys.stderr)
        elif made:
            width, height = entry["size"]
            words = f"{entry['frames']} frames of {width}x{height} at {entry['fps']:g} fps"
            words += f", seed {entry['seed']} ({entry['seconds']:.0f} s)"
            tqdm.write(f"{path}: {words}", file=sys.stdout)
            sys.stdout.flush()

    return report


def _check_ray_flags(arguments: argparse.Namespace) -> None:
    """Refuse what the flags for Ray leave without meaning."""
    for name in ("workers", "cpus"):
        value = getattr(arguments, name)
        if value is not None and arguments.ray is None:
            raise InvalidInputError(f"--{name} is for --ray")
        if value is not None and value < 1:
            raise InvalidInputError(f"--{name}: got {value}, allowed is a whole number from 1")
    if arguments.ray is not None and arguments.device not in (None, "cpu"):
        raise InvalidInputError(
            f"--device: got {arguments.device!r}, allowed with --ray is cpu: it gives each worker its GPU"
        )


def _checked_folders(arguments: argparse.Namespace, items: list[Any]) -> dict[str, str]:
    """Return the folders of the models that items need, after a check of each item's keywords with them."""
    first_model, settings = os.path.expanduser(arguments.model), loading_values(arguments)
    models = {IMAGE_TO_VIDEO: first_model}
    if any(item.second is not None for item in items):
        second_model = os.path.expanduser(arguments.refine or "") or default_refine_model(first_model)
        models[VIDEO_TO_VIDEO] = second_model
    folders = {}
    for stage, model in models.items():
        runs: dict[str, tuple[StageRun, str]] = {}
        for item in items:
            keywords = item.first if stage == IMAGE_TO_VIDEO else item.second
            if keywords is not None:
                runs.setdefault(repr(keywords), (StageRun(stage, model, settings, keywords), item.place))
        for run, place in runs.values():
            try:
                run.check()
            except InvalidInputError as error:
                raise InvalidInputError(f"{place}: {error}") from error
        if runs:
            folders[stage] = next(iter(runs.values()))[0].downloaded().model
    return folders


BATCH = Command(
    "batch",
    "make videos of many images and videos: folders, lists, resumable",
    _add_batch_arguments,
    _batch,
)
