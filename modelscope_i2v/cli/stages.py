"""Running a stage: checked before its weights are loaded, and downloaded where it is not here."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Mapping

from ..errors import InvalidInputError, MissingFileError
from .command import echo

if TYPE_CHECKING:
    from ..engine.generated import GeneratedVideo
    from ..engine.image_to_video import ImageToVideo
    from ..engine.spreading import Spread
    from ..engine.video_to_video import VideoToVideo

#: The published models: their ids on ModelScope's hub, and the version that this package is for.
HUB_ID_IMAGE_TO_VIDEO = "damo/Image-to-Video"
HUB_ID_VIDEO_TO_VIDEO = "damo/Video-to-Video"
REVISION = "v1.1.0"


@dataclass(frozen=True)
class StageRun:
    """A stage to run: its model, the settings that it is loaded with and the keywords of the call."""

    stage: str
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
        from ..weights.adapters import check_adapters, find_adapter

        keywords = check_keywords(self.stage, self.keywords)
        check_device(self.settings.get("device"))
        overrides = {name: value for name, value in self.settings.items() if name != "device"}
        is_here = os.path.exists(self.model)
        if is_here:
            settings = load_settings(self.model, self.stage, overrides)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.model):
            settings = SETTINGS_OF_STAGE[self.stage](**overrides)
        else:
            raise MissingFileError(
                f"there is no folder {self.model!r}, nor is it an id on the hub, which is owner/name"
            )
        request = Request.resolve(settings, keywords)
        check_limits(settings, request)
        if not is_here:
            for path in request.lora:
                find_adapter(path)
            return
        for name in ("ckpt_clip", "ckpt_unet", "ckpt_autoencoder"):
            find_checkpoint(self.model, getattr(settings, name))
        check_adapters(request.lora, self.model, settings)

    def downloaded(self) -> StageRun:
        """Return this run with its model in a folder, checked."""
        if os.path.exists(self.model):
            return self
        run = replace(self, model=download(self.model))
        run.check()
        return run

    def load(self) -> ImageToVideo | VideoToVideo:
        """Load the engine's stage."""
        from ..engine.image_to_video import ImageToVideo
        from ..engine.video_to_video import VideoToVideo

        stage = ImageToVideo if self.stage == ImageToVideo.name else VideoToVideo
        return stage.load(self.model, **self.settings)

    def make(self, source: Any, spread: Spread | None = None) -> GeneratedVideo:
        """Load the stage and return its video of an image or a video, shared by processes."""
        stage, keywords = self.load(), dict(self.keywords)
        if spread is not None:
            stage.spread = spread
            if not spread.is_first:
                keywords["progress"] = False
        return stage(source, **keywords)

    def run(self, source: Any, output: str, spread: Spread | None = None) -> GeneratedVideo:
        """Make the video ``output`` of an image or a video, and say what it is; the first process does."""
        start = time.monotonic()
        video = self.make(source, spread)
        if spread is not None and not spread.is_first:
            return video
        path, (count, height, width, _) = video.save(output), video.frames.shape
        words = f"{count} frames of {width}x{height} at {video.fps:g} fps, seed {video.record['seed']}"
        echo(f"{path}: {words} ({time.monotonic() - start:.0f} s)")
        return video


def default_refine_model(model: str) -> str:
    """Return stage two's model where stage one's is known: the same folder if it describes both."""
    from ..settings.configuration import read_configuration, stages_in

    if os.path.isdir(model) and "video-to-video" in stages_in(read_configuration(model)):
        return model
    return HUB_ID_VIDEO_TO_VIDEO


def check_device(device: str | None) -> None:
    """Refuse a device that is not here, before anything is loaded."""
    if device is None:
        return
    import torch

    match = re.fullmatch(r"cpu|(?:gpu|cuda)(?::([0-9]{1,4}))?", device)
    if match is None:
        raise InvalidInputError(f"--device: got {device!r}, allowed are cpu, gpu, cuda and cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and int(match[1] or 0) >= count:
        raise InvalidInputError(f"--device: got {device!r}, but torch finds {count or 'no'} CUDA GPUs here")


def download(model: str) -> str:
    """Return the folder of a model given by its id on the hub, downloaded if it is not here."""
    from modelscope.hub.snapshot_download import snapshot_download

    revision = REVISION if model in (HUB_ID_IMAGE_TO_VIDEO, HUB_ID_VIDEO_TO_VIDEO) else None
    try:
        return snapshot_download(model, revision=revision)
    except Exception as error:  # of many types, which differ between ModelScope's versions
        raise MissingFileError(
            f"there is no folder {model!r}, and the hub does not give a model of this id: {error}; "
            "with a downloaded model, give its folder"
        ) from error


def let_waiting_threads_sleep() -> None:
    """Keep OpenMP's threads from spinning, which makes small tensors slow where other programs run, too.

    Five times as slow, on two cores with four programs.
    """
    if "torch" not in sys.modules:  # which reads the variable when it is loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
