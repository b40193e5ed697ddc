"""Pipelines of the tiny models by stage, for the tests of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelscope.outputs import OutputKeys
from modelscope.pipelines import pipeline

STAGES = ("image-to-video", "video-to-video")


def built(stage: str, small_model: tuple[Path, Path], **keywords: Any) -> Any:
    """A pipeline on the CPU, unless ``device`` says otherwise."""
    options = {"device": "cpu", **keywords}
    return pipeline(stage, model=str(small_model[STAGES.index(stage)]), **options)


def video_of(result: dict[str, Any]) -> bytes:
    """The file's bytes, wherever they are."""
    video = result[OutputKeys.OUTPUT_VIDEO]
    return video if isinstance(video, bytes) else Path(video).read_bytes()
