"""Both stages: previews of seeds, and stage two of stage one's frames."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterable

from ..errors import ConfigurationError
from ..settings.configuration import SECOND_STAGE_SECTION, read_configuration
from ..settings.keywords import split_keywords, split_settings
from .enhancement import EnhancedFile
from .generated import GeneratedVideo
from .image_to_video import ImageToVideo
from .previews import generate_previews
from .video_to_video import VideoToVideo


class TwoStages:
    """Both stages, with one autoencoder where theirs is the same.

    Example::

        stages = TwoStages.load("path/to/both")
        previews = stages.preview("cat.jpg", seeds=[1, 2, 3, 4])
        stages.refine(previews[2], text="a cat").save("cat.mp4")
        stages.generate("cat.jpg", seed=3, text="a cat").save("cat.mp4")  # the same
    """

    def __init__(self, first: ImageToVideo, second: VideoToVideo):
        self.first, self.second = first, second
        second.share_autoencoder(first)

    @classmethod
    def load(
        cls, folder: str | Path, second_folder: str | Path | None = None, device: Any = None, **settings: Any
    ) -> TwoStages:
        """Load both stages.

        Args:
            folder: stage one's model folder.
            second_folder: stage two's; by default ``folder`` describes both.
            device: as of ``Stage.load``.
            **settings: take precedence over those of the files, in both; but ``lora`` and ``lora_scale`` are
                stage one's, ``refine_lora`` and ``refine_lora_scale`` stage two's.

        Raises:
            ConfigurationError, MissingFileError, CheckpointError, NotEnoughMemoryError: if it cannot be.
        """
        if second_folder is None and not describes_second_stage(folder):
            raise ConfigurationError(f"{folder} describes no second stage; give its folder, too")
        of_first, of_second = split_settings(settings)
        first = ImageToVideo.load(folder, device, **of_first)
        return cls(first, VideoToVideo.load(second_folder or folder, device, **of_second))

    def preview(self, image: Any, seeds: Iterable[int], **keywords: Any) -> list[GeneratedVideo]:
        """Return stage one's video of each seed, to choose the one to refine."""
        return generate_previews(self.first, image, seeds, **keywords)[0]

    def refine(self, video: Any, **keywords: Any) -> GeneratedVideo:
        """Return stage two's video of stage one's, with stage two's keywords."""
        return self.second(video, **keywords)

    def enhance(
        self, video: Any, output: str | os.PathLike, resume: bool = False, **keywords: Any
    ) -> EnhancedFile:
        """Write any video's sharper one to a file, as ``VideoToVideo.enhance`` does."""
        return self.second.enhance(video, output, resume, **keywords)

    def generate(self, image: Any, **keywords: Any) -> GeneratedVideo:
        """Return stage two's video of stage one's of an image; stage one's is its ``first``.

        Args:
            image: as of ``ImageToVideo``.
            **keywords: those that only stage two has go to it, and any of its own with ``refine_`` before the
                name; ``seed``, ``fps``, ``callback``, ``progress`` and ``generator`` go to both; the others
                to stage one.
        """
        first_keywords, second_keywords = split_keywords(keywords)
        # Before any work, and without a draw from a generator, which stage one comes first to.
        self.second.resolve({**second_keywords, "generator": None})
        first = self.first(image, **first_keywords)
        return replace(self.second(first, **second_keywords), first=first)


def describes_second_stage(folder: str | Path) -> bool:
    """Return whether a stage-one folder's configuration describes stage two as well."""
    return SECOND_STAGE_SECTION in read_configuration(folder)
