"""How a video was made: written into its file, returned beside it, and read back to make another like it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Mapping

from .. import __version__
from ..errors import InvalidInputError
from .configuration import FILE_NAME, SETTINGS_OF_STAGE, VideoToVideoSettings
from .request import Request, check_keywords

#: Under this name a refined video's file holds stage one's record, as JSON.
FIRST_STAGE = "first_stage"

#: Call keywords by the request's field that records them.
_RECORDED = {
    "seed": "seed", "steps": "steps", "guide_scale": "guide_scale", "size": "resolution", "fps": "fps",
    "frames": "max_frames", "window": "chunk_size", "overlap": "overlap_size",
    "guidance_interval": "guidance_interval", "reuse_interval": "reuse_interval",
}  # fmt: skip
_RECORDED_BY_STAGE = {
    "image-to-video": {"noise_strength": "noise_strength", "solver": "solver"},
    "video-to-video": {
        name: name
        for name in (
            "text", "positive_prompt", "negative_prompt", "total_noise_levels", "solver_mode",
            "guide_rescale",
        )
    },
}  # fmt: skip


def configuration_sha256(model_dir: str | Path) -> str:
    """Of a model folder's ``configuration.json``, as hexadecimal digits."""
    return hashlib.sha256((Path(model_dir) / FILE_NAME).read_bytes()).hexdigest()


def record(request: Request, model_dir: str | Path, configuration: str, precision: str) -> dict[str, Any]:
    """What a video's file says of how it was made, by name: enough to make it again.

    Besides the request's keywords: ``stage``, ``model`` (the folder's name), ``configuration_sha256`` of
    its file, given as ``configuration``, ``precision``, ``mode`` (``exact``, or what was approximated) and
    ``software``.
    """
    # A name that is not UTF-8 could not be written into the file.
    folder = Path(model_dir).resolve().name.encode("utf-8", "replace").decode("utf-8")
    fields = {**_RECORDED, **_RECORDED_BY_STAGE[request.stage]}
    return {
        "stage": request.stage,
        **{keyword: getattr(request, name) for name, keyword in fields.items()},
        "model": folder,
        "configuration_sha256": configuration,
        "precision": precision,
        "mode": request.mode,
        "software": f"modelscope_i2v {__version__}",
    }


def to_metadata(entries: Mapping[str, Any]) -> dict[str, str]:
    """A record as a video file's metadata: texts as they are, all else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in entries.items()}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The record in a video file's metadata; empty where the file is not one of ours."""
    if not metadata.get("software", "").startswith("modelscope_i2v "):
        return {}
    entries: dict[str, Any] = {}
    for name, value in metadata.items():
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):  # nested thousands of brackets deep
            parsed = value
        # A text that looks like JSON, say a prompt "3", is a text all the same.
        entries[name] = value if name in _TEXTS else parsed
    return entries


_TEXTS = {
    "stage", "model", "software", "precision", "mode", "configuration_sha256", "solver_mode", "solver",
    "text", "positive_prompt", "negative_prompt",
}  # fmt: skip


def keywords_like(metadata: Mapping[str, str], name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The call keywords that made a video: stage one's, and stage two's if it was refined, else None.

    Args:
        metadata: of the file.
        name: of the file, for messages.

    Raises:
        InvalidInputError: if the file is not one that stage one began, or its record is damaged.
    """
    entries = from_metadata(metadata)
    if not entries:
        raise InvalidInputError(f"{name}: says nothing of how it was made: it is not a file of this package")
    if entries["stage"] == VideoToVideoSettings.stage:
        if FIRST_STAGE not in entries:
            raise InvalidInputError(f"{name}: was made from another video, not from an image")
        return _keywords(entries[FIRST_STAGE], name), _keywords(entries, name)
    return _keywords(entries, name), None


def _keywords(entries: Any, name: str) -> dict[str, Any]:
    stage = entries.get("stage") if isinstance(entries, dict) else None
    if stage not in SETTINGS_OF_STAGE:
        raise InvalidInputError(f"{name}: its record names no stage, got {stage!r}")
    known = {*_RECORDED.values(), *_RECORDED_BY_STAGE[stage].values()}
    try:
        return check_keywords(stage, {key: value for key, value in entries.items() if key in known})
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: its record is damaged: {error}") from error
