"""``modelscope-i2v train``: a stage trained on one's own videos and images."""

from __future__ import annotations

import argparse
import os

from ..settings.training import TrainingSettings
from .command import Command, echo, without_none
from .flags import PROGRESS, add_flags, values_of
from .stages import HUB_ID_IMAGE_TO_VIDEO, HUB_ID_VIDEO_TO_VIDEO, StageRun

#: What decides which weights are trained: one of the two.
_WHAT = ("lora", "full")


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", help="a folder of videos and images, with captions in captions.jsonl or in "
        ".txt files beside them")  # fmt: skip
    add("-o", "--output", required=True, metavar="OUT",
        help="the run's folder: OUT/output is the result, an adapter or a model folder")  # fmt: skip
    add("--model", metavar="DIR_OR_ID",
        help="the model's folder, or its id on the hub (default: the published one)")  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    declared = dict(TrainingSettings.declared())
    add_flags(what, [declared.pop(name) for name in _WHAT])
    add("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    add("--validation", metavar="DATA", help="a folder of what validation videos are made of (default: the "
        "first of the data)")  # fmt: skip
    add("--cache", metavar="DIR", help="where latents and embeddings are kept (default: OUT/cache)")
    add("--device", metavar="D", help="cpu, gpu or cuda:N (default: a GPU if there is one)")
    add_flags(parser, [*declared.values(), PROGRESS])


def _train(arguments: argparse.Namespace) -> None:
    settings = TrainingSettings.of(values_of(arguments, TrainingSettings.declared().values()))
    published = {"image-to-video": HUB_ID_IMAGE_TO_VIDEO, "video-to-video": HUB_ID_VIDEO_TO_VIDEO}
    model = os.path.expanduser(arguments.model or published[settings.stage])
    start = StageRun(settings.stage, model, without_none(device=arguments.device), {})
    start.check()
    from ..training.fine_tuning import FineTuning

    run = FineTuning(
        start.downloaded().model,
        os.path.expanduser(arguments.data),
        os.path.expanduser(arguments.output),
        settings,
        validation=arguments.validation and os.path.expanduser(arguments.validation),
        resume=arguments.resume,
        cache=arguments.cache and os.path.expanduser(arguments.cache),
        device=arguments.device,
        progress=arguments.progress,
        echo=echo,
    )
    output = run.train()
    run.echo(f"{output}: {'a model' if settings.full else 'an adapter'} after {run.training.step} steps")


TRAIN = Command(
    "train",
    "train a stage on your own videos and images: an adapter (LoRA), or all weights",
    _add_train_arguments,
    _train,
)
