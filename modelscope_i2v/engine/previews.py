"""Stage one's videos of several seeds, to choose the one to refine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterable

from PIL import Image

from ..errors import InvalidInputError
from ..media.contact_sheet import contact_sheet
from ..media.video import check_writable
from .generated import GeneratedVideo
from .image_to_video import ImageToVideo

SHEET_NAME = "contact_sheet.png"


def generate_previews(
    stage: ImageToVideo,
    image: Any,
    seeds: Iterable[int],
    folder: str | os.PathLike | None = None,
    **keywords: Any,
) -> tuple[list[GeneratedVideo], Image.Image]:
    """Generate a video of each seed, and a sheet of frames of all.

    Args:
        stage: stage one.
        image: as of ``ImageToVideo``.
        seeds: at least one.
        folder: where to write ``seed_N.mp4`` and ``contact_sheet.png``, each as soon as it is made; without
            it nothing is written.
        **keywords: those of a call.

    Raises:
        InvalidInputError: if there are no seeds, or an argument cannot be used.
        OutputError: if a file cannot be written.
    """
    seeds = list(seeds)
    if not seeds:
        raise InvalidInputError("seeds: at least one is needed")
    paths = [None if folder is None else Path(folder).absolute() / f"seed_{seed}.mp4" for seed in seeds]
    for seed, path in zip(seeds, paths):  # before any work
        stage.resolve({**keywords, "seed": seed})
        if path is not None:
            check_writable(path)
    videos = []
    for seed, path in zip(seeds, paths):
        videos.append(stage(image, **{**keywords, "seed": seed}))
        if path is not None:
            videos[-1].save(path)
    sheet = contact_sheet([(f"seed {seed}", video.frames) for seed, video in zip(seeds, videos)])
    if paths[0] is not None:
        sheet.save(paths[0].with_name(SHEET_NAME))
    return videos, sheet
