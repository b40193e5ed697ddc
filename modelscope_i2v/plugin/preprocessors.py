"""ModelScope's preprocessors of the two tasks: from what callers give to what the models take."""

from __future__ import annotations

from typing import Any

from modelscope.preprocessors.base import Preprocessor
from modelscope.preprocessors.builder import PREPROCESSORS
from torch import Tensor

from ..media.images import open_image
from ..media.preprocessing import ClipImageTransform, VideoTransform
from ..media.video import Video, read_video
from .registration import (
    IMAGE_TO_VIDEO_PREPROCESSOR,
    PREPROCESSOR_GROUP,
    VIDEO_TO_VIDEO_PREPROCESSOR,
    register_class,
)


@register_class(PREPROCESSORS, PREPROCESSOR_GROUP, IMAGE_TO_VIDEO_PREPROCESSOR)
class ImageToVideoPreprocessor(Preprocessor):
    """An image (path, URL, bytes, PIL image, or BGR array) to stage one's ``vit_frame`` [1, 3, 224, 224]."""

    def __init__(self, model_dir: str | None = None, *args: Any, transform: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transform = transform or ClipImageTransform()

    def __call__(self, data: Any) -> dict[str, Tensor]:
        return {"vit_frame": self.transform(open_image(data))[None]}


@register_class(PREPROCESSORS, PREPROCESSOR_GROUP, VIDEO_TO_VIDEO_PREPROCESSOR)
class VideoToVideoPreprocessor(Preprocessor):
    """A video (path, URL, bytes, or ``Video``) to stage two's ``video_data`` [F, 3, H, W] in [-1, 1].

    The file's metadata come along as ``source_metadata``.
    """

    def __init__(self, model_dir: str | None = None, *args: Any, transform: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transform = transform or VideoTransform()

    def __call__(self, data: Any) -> dict[str, Any]:
        video = data if isinstance(data, Video) else read_video(data)
        return {"video_data": self.transform(video.frames), "source_metadata": video.metadata}
