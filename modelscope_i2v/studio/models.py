"""The models behind a page: both stages, loaded when one is first needed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from ..engine.image_to_video import ImageToVideo
from ..engine.latent_colours import LatentColours
from ..engine.two_stages import describes_second_stage
from ..engine.video_to_video import VideoToVideo
from ..errors import ConfigurationError
from ..settings.configuration import load_settings
from ..settings.keywords import split_settings
from ..settings.stages import IMAGE_TO_VIDEO, VIDEO_TO_VIDEO, StageSettings
from .watching import Watched

#: The trained model that ships with the package.
SMALL_MODEL = Path(__file__).parents[1] / "assets" / "small_model"


class Models:
    """Both stages of a page, or the first alone.

    They are used by one thread at a time.

    Args:
        first: stage one's folder.
        second: stage two's; by default the first, if it describes both.
        device: as of ``Stage.load``.
        **settings: as of ``TwoStages.load``.

    Attributes:
        settings: by stage, as the folders have them.

    Raises:
        ConfigurationError, MissingFileError: if a folder's configuration cannot be used.
    """

    def __init__(
        self, first: Path | str, second: Path | str | None = None, device: Any = None, **settings: Any
    ):
        if second is None and describes_second_stage(first):
            second = first
        folders = (
            {IMAGE_TO_VIDEO: first} if second is None else {IMAGE_TO_VIDEO: first, VIDEO_TO_VIDEO: second}
        )
        self._folders, self._device = folders, device
        self._loading = dict(zip((IMAGE_TO_VIDEO, VIDEO_TO_VIDEO), split_settings(settings)))
        self.settings: dict[str, StageSettings] = {
            stage: load_settings(folder, stage, self._loading[stage]) for stage, folder in folders.items()
        }
        self._stages: dict[str, ImageToVideo | VideoToVideo] = {}
        self._colours: dict[str, LatentColours] = {}

    @property
    def has_second_stage(self) -> bool:
        return VIDEO_TO_VIDEO in self._folders

    def first(self, progress: Watched) -> ImageToVideo:
        """Return stage one, whose latents the progress can draw from now on."""
        stage = self._stage(ImageToVideo, progress)
        assert isinstance(stage, ImageToVideo)
        return stage

    def second(self, progress: Watched) -> VideoToVideo:
        """Return stage two, as ``first`` does stage one.

        Raises:
            ConfigurationError: if the page has none.
        """
        if not self.has_second_stage:
            raise ConfigurationError("this studio has no model for stage two")
        stage = self._stage(VideoToVideo, progress)
        assert isinstance(stage, VideoToVideo)
        return stage

    def _stage(
        self, kind: type[ImageToVideo] | type[VideoToVideo], progress: Watched
    ) -> ImageToVideo | VideoToVideo:
        if kind.name not in self._stages:
            with progress.phase("loading"):
                stage = kind.load(self._folders[kind.name], self._device, **self._loading[kind.name])
                for other in self._stages.values():
                    stage.share_autoencoder(other)
                self._colours[kind.name] = stage.fit_latent_colours()
                self._stages[kind.name] = stage
        progress.colours = self._colours[kind.name]
        return self._stages[kind.name]


def release_memory() -> None:
    """Give back what a generation that ended or was cancelled held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
