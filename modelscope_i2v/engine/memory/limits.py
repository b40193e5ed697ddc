"""Limits on what a call may ask for, so that a slip of a digit is an error and not a full memory."""

from __future__ import annotations

from ...errors import InvalidInputError
from ...settings.request import Request
from ...settings.stages import VIDEO_TO_VIDEO, StageSettings
from .estimate import memory_in_words


def check_limits(settings: StageSettings, request: Request, frames: int | None = None) -> None:
    """Refuse what goes beyond ``limit_pixels``, ``limit_frames`` or ``limit_steps``.

    Args:
        settings: the model's.
        request: of the call.
        frames: of the video that stage two gets. Its ``max_frames`` is no number of frames to generate, so
            without this it is left out.

    Raises:
        InvalidInputError: with what was asked for, the limit, how to raise it, and the memory needed.
    """
    frames_words = f"video: has {frames or 0:,} frames or more"
    if request.stage != VIDEO_TO_VIDEO:
        frames, frames_words = request.frames, f"max_frames: got {request.frames:,}"
    width, height = request.size
    for limit, got, words in (
        ("limit_pixels", width * height, f"resolution: got {width}x{height}, {width * height:,} pixels"),
        ("limit_frames", frames or 0, frames_words),
        ("limit_steps", request.steps, f"steps: got {request.steps:,}"),
    ):
        allowed = getattr(settings, limit)
        if got > allowed:
            count = frames or min(request.window, settings.limit_frames)
            needed = memory_in_words(settings, request.size, count, request.window)
            raise InvalidInputError(
                f"{words}; {limit} allows {allowed:,}. {needed}. If that is meant, raise {limit}: in "
                f"configuration.json, as a keyword of pipeline(), or as pipe.model.cfg.{limit}"
            )
