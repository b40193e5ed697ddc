"""What the page's buttons do: work for the queue, from files to files."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Mapping

from ..errors import InvalidInputError
from ..media.images import open_image
from ..media.sources import source_name
from ..media.video import read_metadata
from ..settings.record import from_metadata, keywords_like
from ..settings.stages import StageSettings
from .controls import number_of
from .models import Models
from .watching import Watched

SEED = StageSettings.declared()["seed"].rule

#: The most seeds that are tried at a time: so many stand side by side.
MOST_SEEDS = 4


def seeds_from(first: Any, count: Any) -> list[int]:
    """Return so many seeds in a row, from a random one if there is no first.

    Raises:
        InvalidInputError: for a count that is not allowed.
    """
    if not isinstance(count, (int, float)) or not 1 <= count <= MOST_SEEDS:
        raise InvalidInputError(f"seeds: got {count!r}, allowed is a whole number from 1 to {MOST_SEEDS}")
    if first is None or first == "":
        first = secrets.randbelow(2**31)
    start = SEED.check("seed", first if isinstance(first, int) else number_of(str(first)), InvalidInputError)
    return list(range(start, start + int(count)))


def try_seeds(
    models: Models,
    picture: str,
    seeds: list[int],
    keywords: Mapping[str, Any],
    folder: Path,
    progress: Watched,
) -> None:
    """Write stage one's video of each seed."""
    with progress.phase("reading"):
        image = open_image(picture)
    stage = models.first(progress)
    for seed in seeds:
        stage.resolve({**keywords, "seed": seed})  # before any work
    for number, seed in enumerate(seeds):
        progress.video = number
        video = stage(image, **keywords, seed=seed, progress=progress)
        with progress.phase("writing"):
            progress.made.append(video.save(folder / f"seed_{seed}.mp4"))


def refine(models: Models, video: str, keywords: Mapping[str, Any], folder: Path, progress: Watched) -> None:
    """Write stage two's video of stage one's, with stage one's seed unless another is given."""
    seed = from_metadata(read_metadata(video)).get("seed")
    made = models.second(progress)(video, **{"seed": seed, **keywords}, progress=progress)
    with progress.phase("writing"):
        progress.made.append(made.save(folder / f"refined_{made.record['seed']}.mp4"))


def enhance(models: Models, video: str, keywords: Mapping[str, Any], folder: Path, progress: Watched) -> None:
    """Write any video's sharper one."""
    output = folder / f"{Path(video).stem}_enhanced.mp4"
    progress.made.append(models.second(progress).enhance(video, output, progress=progress, **keywords).path)


def make_again(models: Models, made: str, picture: str, folder: Path, progress: Watched) -> None:
    """Write the videos of a picture as those were made that a file's record describes.

    Raises:
        InvalidInputError: if the file is not one that began with a picture, or names adapters: a file that
            somebody sends names no file of the server.
    """
    first, second = keywords_like(read_metadata(made), source_name(made))
    if any("lora" in keywords for keywords in (first, second or {})):
        raise InvalidInputError("adapters")
    progress.videos = 1 if second is None else 2
    try_seeds(models, picture, [first.pop("seed")], first, folder, progress)
    if second is not None:
        progress.video = 1
        refine(models, progress.made[0], second, folder, progress)
