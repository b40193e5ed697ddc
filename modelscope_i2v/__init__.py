"""Image-to-video with I2VGen-XL, behind ModelScope's own calls and in plain Python.

Importing this package, or installing it, makes it the implementation of ModelScope's ``image-to-video`` and
``video-to-video`` tasks (:mod:`modelscope_i2v.plugin.activation`). :class:`ImageToVideo`,
:class:`VideoToVideo` and :class:`TwoStages` need no ModelScope. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib

from modelscope_i2v.plugin.activation import activate

TYPE_CHECKING = False  # as typing's, whose import would be most of what importing this package costs
if TYPE_CHECKING:
    from modelscope_i2v.engine.image_to_video import ImageToVideo
    from modelscope_i2v.engine.two_stages import TwoStages
    from modelscope_i2v.engine.video_to_video import VideoToVideo

__version__ = "0.1.0"
__all__ = ["ImageToVideo", "TwoStages", "VideoToVideo", "__version__"]

_MODULES = {"ImageToVideo": "image_to_video", "TwoStages": "two_stages", "VideoToVideo": "video_to_video"}


def __getattr__(name: str) -> type:
    if name in _MODULES:
        return getattr(importlib.import_module(f"modelscope_i2v.engine.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


activate()
