"""Video files in and out: the names that the rest of the package, and its users, need."""

from __future__ import annotations

from .video_reading import Timing, Video, VideoReader, open_video, read_metadata, read_video
from .video_writing import DEFAULT_FPS, EXTENSIONS, Encoding, check_writable, video_bytes, write_video

__all__ = [
    "DEFAULT_FPS",
    "EXTENSIONS",
    "Encoding",
    "Timing",
    "Video",
    "VideoReader",
    "check_writable",
    "video_bytes",
    "open_video",
    "read_metadata",
    "read_video",
    "write_video",
]
