"""The result of a generation: frames, how they were made, and the file of them."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..media.joining import Part, Sound, join_video
from ..media.video import Encoding, Timing, Video, video_bytes, write_video
from ..settings.request import Request


def encoding_of(request: Request) -> Encoding:
    """Return how the file of a request is encoded."""
    return Encoding(request.codec, request.crf, request.pix_fmt)


@dataclass(frozen=True, eq=False)
class GeneratedVideo(Video):
    """A generated video: an input of stage two, and a file on request.

    Attributes:
        frames: uint8 RGB [F, H, W, 3]; uint16 for an encoding of more than 8 bits.
        fps: frames per second.
        metadata: the record, as a file holds it.
        record: how it was made, enough to make it again (``modelscope_i2v.settings.record.record``).
        seconds: by phase of the generation.
        first: stage one's video, if this one is stage two's of it.
        timing: when the frames are shown, if not at ``fps``.
        sound: what to hear with them.
        encoding: of the file.
    """

    record: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    first: GeneratedVideo | None = None
    timing: Timing | None = None
    sound: Sound | None = None
    encoding: Encoding = Encoding()  # noqa: RUF009 - it is frozen

    def save(self, path: str | os.PathLike) -> str:
        """Write a file, H.264 unless asked for otherwise, which appears when it is complete; return its path.

        Raises:
            OutputError: if it cannot be written.
        """
        if self.timing is None:
            return write_video(self.frames, path, self.fps, self.metadata, self.encoding)
        with tempfile.TemporaryDirectory(prefix="i2v-") as folder:
            part = os.path.join(folder, f"part{Path(path).suffix}")
            rate = self.timing.rate.limit_denominator(1001)  # as the file can have it
            write_video(self.frames, part, rate, None, self.encoding)
            parts = [Part(part, len(self.frames), rate)]
            return join_video(parts, path, self.timing, self.metadata, self.sound)

    def to_bytes(self) -> bytes:
        """Return the bytes of the file that ``save`` would write."""
        if self.timing is None and self.encoding == Encoding():
            return video_bytes(self.frames, self.fps, self.metadata)
        with tempfile.TemporaryDirectory(prefix="i2v-") as folder:
            ending = ".mov" if self.encoding.codec == "prores" else ".mp4"
            return Path(self.save(os.path.join(folder, f"video{ending}"))).read_bytes()
