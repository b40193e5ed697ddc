"""What is trained on: videos and images with captions, and the clips that are taken of them.

Everything here is files, frames and plain numbers; what networks make of clips is in ``encoding``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping

import numpy as np
from PIL import Image, ImageOps

from ..errors import InvalidInputError, MissingFileError, describe
from ..media.images import open_image
from ..media.sources import IMAGE_ENDINGS, VIDEO_ENDINGS, source_name
from ..media.video import Video, open_video
from ..models.config import UNetConfig

logger = logging.getLogger(__name__)

CAPTIONS_FILE = "captions.jsonl"

#: Names under which a row, of a data set or of ``captions.jsonl``, may have its parts.
_VIDEO_KEYS, _IMAGE_KEYS = ("video", "video_path"), ("image", "image_path")
_FILE_KEYS = ("file", "file_name", *_VIDEO_KEYS, *_IMAGE_KEYS)
_TEXT_KEYS = ("text", "caption", "prompt")


@dataclass(frozen=True, eq=False)
class Item:
    """A video or an image with its caption; ``source`` is what ``open_video`` or ``open_image`` takes."""

    source: Any
    is_video: bool
    text: str = ""

    @property
    def name(self) -> str:
        return source_name(self.source)


@dataclass(frozen=True)
class Clip:
    """Frames of an item that are trained on together: one for an image.

    Attributes:
        start, stride, frames: of the item's frames, the first, the distance of two, and how many.
        fps: frames per second that this comes to, rounded.
        size: (width, height) in pixels to which they are scaled and cropped.
    """

    start: int
    stride: int
    frames: int
    fps: int
    size: tuple[int, int]

    @property
    def bucket(self) -> tuple[int, tuple[int, int]]:
        """What clips have in common that go through the network together."""
        return self.frames, self.size


def read_items(data: Any) -> list[Item]:
    """Return what there is to train on, of a folder or of rows.

    Args:
        data: a folder, with whatever is below it; a data set of ModelScope or another library, or any other
            iterable, whose rows are dicts with ``video`` or ``image`` and, if there is one, ``text``. Files
            in a folder have their captions in its ``captions.jsonl``, a line such as
            ``{"file": "a.mp4", "text": "a cat"}`` for each, or each in a ``.txt`` file of its name.

    Raises:
        InvalidInputError, MissingFileError: if there is nothing to train on, or a row is none.
    """
    if isinstance(data, (str, os.PathLike)):
        items = _items_of_folder(Path(data))
        place = f"the folder '{data}'"
    elif isinstance(data, Iterable) and not isinstance(data, (bytes, Mapping)):
        items = [_item_of_row(row, number) for number, row in enumerate(data)]
        place = "the data set"
    else:
        raise InvalidInputError(f"data: a folder or rows are needed, got {describe(data)}")
    if not items:
        raise InvalidInputError(f"{place} has no video and no image to train on")
    return items


def _items_of_folder(folder: Path) -> list[Item]:
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "is not there"
        raise MissingFileError(f"data: a folder of videos and images is needed; '{folder}' {found}")
    captions = _captions(folder / CAPTIONS_FILE)
    items = []
    for path in sorted(folder.rglob("*")):
        ending = path.suffix.lower()
        if not path.is_file() or path.name.startswith(".") or ending not in VIDEO_ENDINGS | IMAGE_ENDINGS:
            continue
        text = captions.get(path.relative_to(folder).as_posix())
        beside = path.with_suffix(".txt")
        if text is None and beside.is_file():
            text = beside.read_text(encoding="utf-8", errors="replace").strip()
        items.append(Item(str(path), ending in VIDEO_ENDINGS, text or ""))
    return items


def _captions(path: Path) -> dict[str, str]:
    """Return captions by the path of a file, relative to the folder."""
    if not path.is_file():
        return {}
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read as UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file, text = _first(row, _FILE_KEYS), _first(row, _TEXT_KEYS)
        except (ValueError, AttributeError, RecursionError) as error:
            raise InvalidInputError(f"{path}: line {number} is no JSON object: {error}") from error
        if not isinstance(file, str) or not isinstance(text, str):
            raise InvalidInputError(f'{path}: line {number}: {{"file": ..., "text": ...}} is needed')
        captions[os.path.normpath(file).replace(os.sep, "/")] = text
    return captions


def _item_of_row(row: Any, number: int) -> Item:
    if isinstance(row, Item):
        return row
    if not isinstance(row, Mapping):
        raise InvalidInputError(f"data: row {number}: a dict is needed, got {describe(row)}")
    video, image = _first(row, _VIDEO_KEYS), _first(row, _IMAGE_KEYS)
    if (video is None) == (image is None):
        found = ", ".join(map(str, row)) or "none"
        raise InvalidInputError(f"data: row {number}: either 'video' or 'image' is needed, got {found}")
    text = _first(row, _TEXT_KEYS)
    return Item(image if video is None else video, video is not None, "" if text is None else str(text))


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def sizes_near(size: tuple[int, int], unet: UNetConfig, downscale: int) -> list[tuple[int, int]]:
    """Return the sizes that clips are brought to: one of each shape, of about as many pixels as ``size``.

    All are sizes that the UNet takes as they are. The first is ``size`` itself, or the next such one.
    """
    width, height = (side / downscale for side in size)
    half_a_step = 2 ** (len(unet.dim_mult) - 1) // 2  # of the sizes that are taken; it rounds up
    sizes: list[tuple[int, int]] = []
    for ratio in (None, 16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16):
        if ratio is None:
            rows, columns = unet.padded_size(math.ceil(height), math.ceil(width))
        else:
            wanted = math.sqrt(width * height / ratio), math.sqrt(width * height * ratio)
            rows, columns = unet.padded_size(*(max(round(side) - half_a_step, 1) for side in wanted))
        if all(abs(math.log(columns / rows * other[1] / other[0])) > 0.1 for other in sizes):
            sizes.append((columns * downscale, rows * downscale))
    return sizes


def nearest_size(size: tuple[int, int], sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the one whose shape is nearest to that of ``size``."""
    return min(sizes, key=lambda each: abs(math.log(size[0] / size[1] * each[1] / each[0])))


def clips_of_video(
    count: int, rate: float, size: tuple[int, int], frames: int, fps: int, most: int
) -> list[Clip]:
    """Return the clips of a video, one after the other from its beginning.

    A video that is too short at ``fps`` gives one clip at a higher rate, of its own rate at most; one that
    has fewer than ``frames`` frames at all, clips of half as many, a quarter, and so on.

    Args:
        count, rate: the video's frames, and frames per second.
        size: to which the clips are brought.
        frames, fps: of a clip.
        most: clips that are wanted at most.
    """
    stride = max(1, min(round(rate / fps), (count - 1) // max(frames - 1, 1)))
    while frames > 1 and (frames - 1) * stride >= count:
        frames = -(-frames // 2)
    span = frames * stride
    starts = range(0, max(count - (frames - 1) * stride, 1), span)[:most]
    return [Clip(start, stride, frames, max(1, round(rate / stride)), size) for start in starts]


def clip_of_image(size: tuple[int, int], fps: int) -> Clip:
    """Return the clip of one frame that an image is."""
    return Clip(0, 1, 1, fps, size)


def frames_of(item: Item, most: int | None = None) -> Iterator[np.ndarray]:
    """Yield the frames of an item, uint8 RGB [H, W, 3]."""
    if not item.is_video:
        yield np.asarray(open_image(item.source))
    elif isinstance(item.source, Video):
        yield from item.source.frames[:most]
    else:
        with open_video(item.source, most) as reader:
            yield from reader


def probe(item: Item, most: int) -> tuple[int, float, tuple[int, int]]:
    """Return the frames (``most`` are counted), frames per second, and (width, height) of an item."""
    if not item.is_video:
        image = open_image(item.source)
        return 1, 1.0, image.size
    if isinstance(item.source, Video):
        height, width = item.source.frames.shape[1:3]
        return min(len(item.source.frames), most), item.source.fps, (width, height)
    with open_video(item.source, most) as reader:
        return sum(1 for _ in reader), reader.fps, reader.size


def fitted(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a frame scaled to cover ``size`` (width, height), and cropped to it around its centre."""
    return np.asarray(ImageOps.fit(Image.fromarray(frame), size, Image.Resampling.BICUBIC))
