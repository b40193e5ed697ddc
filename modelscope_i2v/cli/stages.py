"""Running a stage through ModelScope's own call, checked before its weights are loaded."""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from ..errors import InvalidInputError, MissingFileError
from .command import echo

#: The published models: their ids on ModelScope's hub, and the version that this package is for.
HUB_ID_IMAGE_TO_VIDEO = "damo/Image-to-Video"
HUB_ID_VIDEO_TO_VIDEO = "damo/Video-to-Video"
REVISION = "v1.1.0"

_CHECKPOINTS = ("ckpt_clip", "ckpt_unet", "ckpt_autoencoder")


@dataclass(frozen=True)
class Stage:
    """A stage to run: the task, the model, what the pipeline is built with and what it is called with."""

    task: str
    model: str
    settings: Mapping[str, Any]
    keywords: Mapping[str, Any]

    def check(self) -> None:
        """Raise, before any weights are loaded, what would be raised after minutes.

        Raises:
            I2VError: for a model that is not there, or keywords that are not allowed.
        """
        from ..engine.memory.limits import check_limits
        from ..settings.configuration import load_settings
        from ..settings.keywords import check_keywords
        from ..settings.request import Request
        from ..settings.stages import SETTINGS_OF_STAGE
        from ..weights import find_checkpoint

        keywords = check_keywords(self.task, self.keywords)
        check_device(self.settings.get("device"))
        overrides = {name: value for name, value in self.settings.items() if name != "device"}
        if not os.path.exists(self.model):
            if not _is_hub_id(self.model):
                raise MissingFileError(
                    f"there is no folder {self.model!r}, nor is it an id on the hub, which is owner/name"
                )
            settings = SETTINGS_OF_STAGE[self.task](**overrides)
            check_limits(settings, Request.resolve(settings, keywords))
            return
        settings = load_settings(self.model, self.task, overrides)
        check_limits(settings, Request.resolve(settings, keywords))
        for name in _CHECKPOINTS:
            find_checkpoint(self.model, getattr(settings, name))

    def build(self, debug: bool = False) -> Any:
        """The pipeline, through ModelScope's own call."""
        from modelscope.pipelines import pipeline

        with quiet(debug):
            return pipeline(self.task, model=self.model, **self.settings)

    def run(self, source: Any, output: str, debug: bool = False) -> None:
        """Make the video ``output`` of an image or a video, and say what it is."""
        from modelscope.outputs import OutputKeys

        from ..media.video import read_video

        start = time.monotonic()
        with quiet(debug):
            result = self.build(debug)(source, output_video=output, **self.keywords)
        path, seed = result[OutputKeys.OUTPUT_VIDEO], result["seed"]
        video = read_video(path)
        count, height, width, _ = video.frames.shape
        took = time.monotonic() - start
        echo(f"{path}: {count} frames of {width}x{height} at {video.fps:g} fps, seed {seed} ({took:.0f} s)")


def check_device(device: str | None) -> None:
    """Refuse what ModelScope cannot use, or would silently replace by the CPU."""
    if device is None:
        return
    import torch

    match = re.fullmatch(r"cpu|(?:gpu|cuda)(?::([0-9]{1,4}))?", device)
    if match is None:
        raise InvalidInputError(f"--device: got {device!r}, allowed are cpu, gpu, cuda and cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and int(match[1] or 0) >= count:
        raise InvalidInputError(f"--device: got {device!r}, but torch finds {count or 'no'} CUDA GPUs here")


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None


def download(model: str, debug: bool = False) -> str:
    """The folder of a model given by its id on the hub; of one given by its folder, that."""
    if os.path.exists(model):
        return model
    from modelscope.hub.snapshot_download import snapshot_download

    revision = REVISION if model in (HUB_ID_IMAGE_TO_VIDEO, HUB_ID_VIDEO_TO_VIDEO) else None
    try:
        return snapshot_download(model, revision=revision)
    except Exception as error:  # of many types, which differ between ModelScope's versions
        raise MissingFileError(
            f"there is no folder {model!r}, and the hub does not give a model of this id: {error}; "
            "with a downloaded model, give its folder"
        ) from error


def release_memory() -> None:
    """Give back what a stage held, for the next."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def let_waiting_threads_sleep() -> None:
    """Keep OpenMP's threads from spinning, which makes small tensors slow where other programs run, too.

    Five times as slow, on two cores with four programs.
    """
    if "torch" not in sys.modules:  # which reads the variable when it is loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Without ModelScope's information lines, unless they are asked for."""
    if debug or "MODELSCOPE_LOG_LEVEL" in os.environ:
        yield
        return
    from modelscope.utils.logger import get_logger

    # Of the handlers: the logger's own level is set again whenever a module asks for the logger.
    levels = {handler: handler.level for handler in get_logger().handlers}
    try:
        for handler in levels:
            handler.setLevel(logging.WARNING)
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)
