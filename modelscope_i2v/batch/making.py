"""Making the videos of items: stages loaded once, and what is said of each video."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Mapping

import numpy as np
from PIL import Image, ImageOps

from ..engine.devices import release_memory
from ..engine.generated import GeneratedVideo
from ..engine.image_to_video import ImageToVideo
from ..engine.stage import Stage
from ..engine.video_to_video import VideoToVideo
from ..errors import I2VError, redact
from ..media.files import atomic_file
from ..media.images import open_image
from ..media.video import read_video
from ..metrics import scores
from ..settings.record import configuration_sha256
from ..settings.stages import IMAGE_TO_VIDEO, VIDEO_TO_VIDEO
from .items import Item, file_sha256
from .results import DONE, FAILED, WORK_FOLDER

logger = logging.getLogger(__name__)

_STAGES: dict[str, Any] = {IMAGE_TO_VIDEO: ImageToVideo, VIDEO_TO_VIDEO: VideoToVideo}


@dataclass(frozen=True)
class Models:
    """Which models a batch uses.

    Attributes:
        folders: by stage.
        settings: what stages are loaded with, ``device`` among them.
    """

    folders: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def identities(self) -> dict[str, Any]:
        """Return what decides videos of these models beside keywords, by stage."""
        precision = self.settings.get("precision", "auto")
        return {
            stage: [Path(folder).resolve().name, configuration_sha256(folder), precision]
            for stage, folder in self.folders.items()
        }


@dataclass(frozen=True)
class Options:
    """How a batch works.

    Attributes:
        by_stage: stage one of all items goes before stage two of all, each loaded by itself.
        score: whether results have the scores of the videos.
        progress: whether to show bars; by default on a terminal and in a notebook.
    """

    by_stage: bool = False
    score: bool = False
    progress: bool | None = None


@dataclass(frozen=True)
class Task:
    """An item to work on, up to a stage."""

    item: Item
    key: str
    stages: tuple[str, ...]


class Maker:
    """Makes videos in a batch's folder, beside their places: ``settle`` puts them there.

    Args:
        folder: the batch's.
        models: loaded when the first item needs them.
        options: of the batch.
    """

    def __init__(self, folder: str | os.PathLike, models: Models, options: Options):
        self._work, self._models, self._options = Path(folder, WORK_FOLDER), models, options
        self._loaded: dict[str, Stage] = {}

    def make(self, task: Task) -> dict[str, Any] | None:
        """Return the entry of an item's video, or of its failure; None if stage two is still to come.

        Raises:
            I2VError: for a model that cannot be loaded: it would fail all items.
        """
        for stage in task.stages:
            self._load(stage)
        start, item = time.monotonic(), task.item
        try:
            entry = self._made(task)
        except Exception as error:  # whatever it is, it is this item's
            if not isinstance(error, I2VError):
                logger.exception("%s", item.place)
            entry = failure(item, task.key, error)
        return entry and {**entry, "seconds": round(time.monotonic() - start, 3), **signature()}

    def _load(self, stage: str) -> None:
        if stage in self._loaded:
            return
        if self._options.by_stage and self._loaded:
            self._loaded.clear()
            release_memory()
        self._loaded[stage] = _STAGES[stage].load(self._models.folders[stage], **self._models.settings)
        if len(self._loaded) == 2:
            self._loaded[VIDEO_TO_VIDEO].share_autoencoder(self._loaded[IMAGE_TO_VIDEO])

    def _made(self, task: Task) -> dict[str, Any] | None:
        item, path = task.item, work_path(self._work, task.item, task.key)
        second: Any = self._loaded.get(VIDEO_TO_VIDEO)
        if item.is_video:
            done = second.enhance(item.source, path, resume=True, **self._keywords(item.second))
            record, facts = done.record, {"frames": done.frames, "size": list(done.size), "fps": done.fps}
        else:
            video = self._first(task)
            if item.second is not None:
                if VIDEO_TO_VIDEO not in task.stages:
                    return None
                video = second(video, **self._keywords(item.second))
            video.save(path)
            count, height, width, _ = video.frames.shape
            record, facts = video.record, {"frames": count, "size": [width, height], "fps": video.fps}
        entry = {**_head(item, task.key), "status": DONE, "seed": record["seed"], **facts}
        entry.update(bytes=os.path.getsize(path), sha256=file_sha256(path))
        if self._options.score:
            entry["scores"] = _scores(item, path)
        return entry

    def _first(self, task: Task) -> GeneratedVideo:
        """Return stage one's video: made, or kept by an earlier pass."""
        kept = first_path(self._work, task.key)
        if kept.exists():
            return _read_first(kept)
        stage: Any = self._loaded[IMAGE_TO_VIDEO]
        video = stage(task.item.source, **self._keywords(task.item.first))
        if task.item.second is not None and VIDEO_TO_VIDEO not in task.stages:
            with atomic_file(kept) as temporary, open(temporary, "wb") as file:
                record = json.dumps([video.fps, video.metadata])
                np.savez_compressed(file, frames=video.frames, record=np.array(record))
        return video

    def _keywords(self, keywords: Mapping[str, Any] | None) -> dict[str, Any]:
        return {**(keywords or {}), "progress": self._options.progress}


def work_path(work: Path, item: Item, key: str) -> Path:
    """Return where an item's video is until it is complete; what an interrupted one has is beside it."""
    return work / f"{key[:32]}{Path(item.output).suffix}"


def first_path(work: Path, key: str) -> Path:
    """Return where stage one's video of an item is kept for stage two."""
    return work / f"{key[:32]}.npz"


def failure(item: Item, key: str | None, error: BaseException) -> dict[str, Any]:
    """Return the entry of an item that failed."""
    words = redact(" ".join(str(error).split()))
    return {**_head(item, key), "status": FAILED, "error": f"{type(error).__name__}: {words}"}


def _head(item: Item, key: str | None) -> dict[str, Any]:
    return {"output": item.output, "source": redact(item.source), "key": key}


def signature() -> dict[str, str]:
    """Return who made something, and when."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return {"finished": now, "process": f"{socket.gethostname()}:{os.getpid()}"}


def _read_first(path: Path) -> GeneratedVideo:
    with np.load(path, allow_pickle=False) as arrays:
        fps, metadata = json.loads(str(arrays["record"]))
        return GeneratedVideo(arrays["frames"], fps, metadata)


def _scores(item: Item, path: Path) -> dict[str, float]:
    """Return the scores of a video, for an image with those of the two."""
    frames = read_video(path).frames
    if item.is_video:
        return scores(frames)
    size = (frames.shape[2], frames.shape[1])
    image = ImageOps.fit(open_image(item.source), size, Image.Resampling.BOX)
    return scores(frames, image=np.asarray(image))
