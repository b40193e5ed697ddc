"""ModelScope's preprocessors of the two tasks: from what callers give to what the models take."""

from __future__ import annotations

from typing import Any, Mapping

from modelscope.preprocessors.base import Preprocessor
from modelscope.preprocessors.builder import PREPROCESSORS
from torch import Tensor

from ..errors import InvalidInputError, describe
from ..media.images import open_image
from ..media.preprocessing import ClipImageTransform, VideoTransform
from ..media.video import Video, read_video
from .registration import IMAGE_TO_VIDEO, PREPROCESSOR_GROUP, VIDEO_TO_VIDEO, register_class

#: What stage two's input may hold beside the video; further keys are left alone.
PROMPT_KEYS = ("text", "positive_prompt", "negative_prompt", "total_noise_levels")


@register_class(PREPROCESSORS, PREPROCESSOR_GROUP, "image-to-video-preprocessor")
class ImageToVideoPreprocessor(Preprocessor):
    """An image (path, URL, bytes, PIL image, or BGR array) to stage one's ``vit_frame`` [1, 3, 224, 224].

    Also takes a dataset's row, a mapping with an entry ``image``.
    """

    def __init__(self, model_dir: str | None = None, *args: Any, transform: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transform = transform or ClipImageTransform()

    def __call__(self, data: Any) -> dict[str, Tensor]:
        return {"vit_frame": self.transform(open_image(_entry(data, "image", IMAGE_TO_VIDEO)))[None]}


@register_class(PREPROCESSORS, PREPROCESSOR_GROUP, "video-to-video-preprocessor")
class VideoToVideoPreprocessor(Preprocessor):
    """A video (path, URL, bytes, or ``Video``) to stage two's ``video_data`` [F, 3, H, W] in [-1, 1].

    Also takes the pipeline's input, a mapping with an entry ``video_path``. The file's metadata come along as
    ``source_metadata``, and so do the mapping's entries of :data:`PROMPT_KEYS`.
    """

    def __init__(self, model_dir: str | None = None, *args: Any, transform: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transform = transform or VideoTransform()

    def __call__(self, data: Any) -> dict[str, Any]:
        source, prompts = split_prompts(data)
        video = source if isinstance(source, Video) else read_video(source)
        return {**prompts, "video_data": self.transform(video.frames), "source_metadata": video.metadata}


def split_prompts(data: Any) -> tuple[Any, dict[str, Any]]:
    """Return the video of stage two's input, and what that gives of :data:`PROMPT_KEYS`.

    Raises:
        InvalidInputError: for a mapping without ``video_path``.
    """
    video = _entry(data, "video_path", VIDEO_TO_VIDEO)
    prompts = data if isinstance(data, Mapping) else {}
    return video, {name: prompts[name] for name in PROMPT_KEYS if name in prompts}


def _entry(data: Any, key: str, stage: str) -> Any:
    """Return the entry of a mapping, and anything else as it is."""
    if not isinstance(data, Mapping):
        return data
    if key not in data:
        got = ", ".join(name if isinstance(name, str) else describe(name) for name in data) or "none"
        raise InvalidInputError(f"{stage}: the input needs the key {key!r}, got {got}")
    return data[key]
