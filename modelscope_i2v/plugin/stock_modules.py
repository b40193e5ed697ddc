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

#: By the path of a shipped module: its class, our module, and our class.
_CLASSES = {}
for _name, _class in (("image_to_video", "ImageToVideo"), ("video_to_video", "VideoToVideo")):
    _CLASSES[f"modelscope.models.multi_modal.{_name}.{_name}_model"] = (_class, "models", f"{_class}Model")
    _path, _class = f"modelscope.pipelines.multi_modal.{_name}_pipeline", f"{_class}Pipeline"
    _CLASSES[_path] = (_class, "pipelines", _class)


class StockModuleFinder:
    """Finder and loader, as the import system knows them, of the shipped modules' names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of one of the four modules, None for any other."""
        loader: Any = self  # without importlib.abc, whose import would cost every start
        return ModuleSpec(name, loader) if name in _CLASSES else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the making of the module to the import system."""

    def exec_module(self, module: Any) -> None:
        """Give the module our class under the shipped one's name."""
        class_name, our_module, our_name = _CLASSES[module.__name__]
        ours = importlib.import_module(f"modelscope_i2v.plugin.{our_module}")
        setattr(module, class_name, getattr(ours, our_name))

    def start(self) -> None:
        """Answer from now on, also for those of the modules that were imported before."""
        if self in sys.meta_path:
            return
        sys.meta_path.insert(0, self)
        for name, (class_name, *_) in _CLASSES.items():
            package, _, module_name = name.rpartition(".")
            if sys.modules.pop(name, None) is not None and package in sys.modules:
                for attribute in (module_name, class_name):
                    vars(sys.modules[package]).pop(attribute, None)


finder = StockModuleFinder()
