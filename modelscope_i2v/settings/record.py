"""How a video was made: written into its file, returned beside it, and read back to make another like it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Mapping

from .. import __version__
from ..errors import InvalidInputError, describe
from .configuration import FILE_NAME
from .keywords import check_keywords
from .request import Request, computed_settings
from .stages import IMAGE_TO_VIDEO, SETTINGS_OF_STAGE, VIDEO_TO_VIDEO

#: Entries of a record beside the request's keywords.
_BESIDE = ("stage", "model", "configuration_sha256", "precision", "mode", "software")

#: Under this name a refined video's file holds stage one's record, as JSON.
FIRST_STAGE = "first_stage"


def configuration_sha256(model_dir: str | Path) -> str:
    """Return the SHA-256 of a model folder's ``configuration.json``, as hexadecimal digits."""
    return hashlib.sha256((Path(model_dir) / FILE_NAME).read_bytes()).hexdigest()


def record(request: Request, model_dir: str | Path, configuration: str, precision: str) -> dict[str, Any]:
    """Return the record of a generation, by name: enough to make its video again.

    Besides the request's keywords: ``stage``, ``model`` (the folder's name), ``configuration_sha256`` of
    its file, given as ``configuration``, ``precision``, ``mode`` (``exact``, or what was approximated) and
    ``software``. Of adapters, as of the model, there are the names, not the paths.
    """
    keywords = request.keywords()
    if request.lora:
        keywords["lora"] = [_name(path) for path in request.lora]
    return {
        "stage": request.stage,
        **keywords,
        "model": _name(model_dir),
        "configuration_sha256": configuration,
        "precision": precision,
        "mode": request.mode,
        "software": f"modelscope_i2v {__version__}",
    }


def _name(path: str | Path) -> str:
    """Return a path's last part, as it can be written into a file: UTF-8."""
    return Path(path).expanduser().resolve().name.encode("utf-8", "replace").decode("utf-8")


def to_metadata(entries: Mapping[str, Any]) -> dict[str, str]:
    """Return a record as a video file's metadata: texts as they are, all else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in entries.items()}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the record in a video file's metadata; empty where the file is not one of ours."""
    if not metadata.get("software", "").startswith("modelscope_i2v "):
        return {}
    declared = [each for stage in SETTINGS_OF_STAGE for each in computed_settings(stage).values()]
    # A text that looks like JSON, say a prompt "3", is a text all the same.
    texts = {*_BESIDE, *(each.keyword for each in declared if each.rule.kind in ("text", "choice"))}
    return {name: value if name in texts else _parsed(value) for name, value in metadata.items()}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # nested thousands of brackets deep
        return value


def first_stage_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what stage two's record says of stage one, if the metadata of its source's file do."""
    first_stage = from_metadata(metadata)
    return {FIRST_STAGE: first_stage} if first_stage.get("stage") == IMAGE_TO_VIDEO else {}


def keywords_like(metadata: Mapping[str, str], name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the call keywords that made a video: stage one's, and stage two's if it was refined, else None.

    Args:
        metadata: of the file.
        name: of the file, for messages.

    Raises:
        InvalidInputError: if the file is not one that stage one began, or its record is damaged.
    """
    entries = from_metadata(metadata)
    if not entries:
        raise InvalidInputError(f"{name}: says nothing of how it was made: it is not a file of this package")
    if entries.get("stage") == VIDEO_TO_VIDEO:
        if FIRST_STAGE not in entries:
            raise InvalidInputError(f"{name}: was made from another video, not from an image")
        return _keywords(entries[FIRST_STAGE], name), _keywords(entries, name)
    return _keywords(entries, name), None


def _keywords(entries: Any, name: str) -> dict[str, Any]:
    stage = entries.get("stage") if isinstance(entries, dict) else None
    if stage not in list(SETTINGS_OF_STAGE):  # which, in a damaged file, may be unhashable
        raise InvalidInputError(f"{name}: its record names no stage, got {describe(stage)}")
    known = {each.keyword for each in computed_settings(stage).values()}
    try:
        return check_keywords(stage, {key: value for key, value in entries.items() if key in known})
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: its record is damaged: {error}") from error
