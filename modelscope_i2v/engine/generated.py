"""The result of a generation: frames, how they were made, and the file of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..media.video import Video, video_bytes, write_video


@dataclass(frozen=True, eq=False)
class GeneratedVideo(Video):
    """A generated video: an input of stage two, and a file on request.

    Attributes:
        frames: uint8 RGB [F, H, W, 3].
        fps: frames per second.
        metadata: the record, as a file holds it.
        record: how it was made, enough to make it again (``modelscope_i2v.settings.record.record``).
        seconds: by phase of the generation.
        first: stage one's video, if this one is stage two's of it.
    """

    record: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    first: GeneratedVideo | None = None

    def save(self, path: str | os.PathLike) -> str:
        """Write an H.264 file, which appears only when it is complete, and return its path.

        Raises:
            OutputError: if it cannot be written.
        """
        return write_video(self.frames, path, self.fps, self.metadata)

    def to_bytes(self) -> bytes:
        """Return the bytes of the file that ``save`` would write."""
        return video_bytes(self.frames, self.fps, self.metadata)
