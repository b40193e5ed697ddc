"""Serves this package's classes under the paths of the four modules that ModelScope ships for the two tasks.

Client code imports ``VideoToVideoPipeline`` and its like from there. The shipped modules would register their
own classes, which is refused once ours are in ModelScope's registries, and which no longer run.

Nothing here imports ModelScope: :data:`finder` stands on ``sys.meta_path`` and answers for four names.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False  # typing's own, whose import would cost every start
if TYPE_CHECKING:
    from typing import Any

#: By the path of a shipped module: its class, and where ours is.
STOCK_CLASSES = {
    "modelscope.models.multi_modal.image_to_video.image_to_video_model": (
        "ImageToVideo", "modelscope_i2v.plugin.models", "ImageToVideoModel",
    ),
    "modelscope.models.multi_modal.video_to_video.video_to_video_model": (
        "VideoToVideo", "modelscope_i2v.plugin.models", "VideoToVideoModel",
    ),
    "modelscope.pipelines.multi_modal.image_to_video_pipeline": (
        "ImageToVideoPipeline", "modelscope_i2v.plugin.pipelines", "ImageToVideoPipeline",
    ),
    "modelscope.pipelines.multi_modal.video_to_video_pipeline": (
        "VideoToVideoPipeline", "modelscope_i2v.plugin.pipelines", "VideoToVideoPipeline",
    ),
}  # fmt: skip


class StockModuleFinder:
    """Finder and loader, as the import system knows them, of the modules of :data:`STOCK_CLASSES`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of one of the four modules, None for any other."""
        if name not in STOCK_CLASSES:
            return None
        loader: Any = self  # which importlib.abc.Loader would be dear to say
        return ModuleSpec(name, loader, origin=STOCK_CLASSES[name][1])

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the making of the module to the import system."""

    def exec_module(self, module: Any) -> None:
        """Give the module our class under the shipped one's name."""
        class_name, our_module, our_name = STOCK_CLASSES[module.__name__]
        setattr(module, class_name, getattr(importlib.import_module(our_module), our_name))

    def start(self) -> None:
        """Answer from now on, also for those of the modules that were imported before."""
        if self in sys.meta_path:
            return
        sys.meta_path.insert(0, self)
        for name, (class_name, *_) in STOCK_CLASSES.items():
            package, _, module_name = name.rpartition(".")
            if sys.modules.pop(name, None) is not None and package in sys.modules:
                for attribute in (module_name, class_name):
                    vars(sys.modules[package]).pop(attribute, None)


finder = StockModuleFinder()
