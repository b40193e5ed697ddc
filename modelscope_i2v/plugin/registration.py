"""Puts this package's classes behind ModelScope's names for the two tasks.

ModelScope finds a class in two steps: a lazy index says which module to import for (registry, group, name),
and importing that module registers the class. :func:`register` repoints the index entries, so that the
modules that ModelScope ships under these names are neither imported nor checked for their requirements, and
:func:`register_class` registers with ``force``, so that ours also replaces a class that is there already.

Nothing here imports ModelScope. What is not loaded yet is left alone: the start-up code in
:mod:`modelscope_i2v.plugin.activation` calls :func:`register` again when it is.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own, whose import would cost every start
if TYPE_CHECKING:
    from typing import Any

IMAGE_TO_VIDEO = "image-to-video"
VIDEO_TO_VIDEO = "video-to-video"

IMAGE_TO_VIDEO_MODEL = "image-to-video-model"
VIDEO_TO_VIDEO_MODEL = "video-to-video-model"
IMAGE_TO_VIDEO_PIPELINE = "image-to-video-task-pipeline"
VIDEO_TO_VIDEO_PIPELINE = "video-to-video-pipeline"
IMAGE_TO_VIDEO_PREPROCESSOR = "image-to-video-preprocessor"
VIDEO_TO_VIDEO_PREPROCESSOR = "video-to-video-preprocessor"

#: Preprocessors are grouped by field, not by task; this is the field that ModelScope files both tasks under.
PREPROCESSOR_GROUP = "multi-modal"

_MODELS_MODULE = "modelscope_i2v.plugin.models"
_PIPELINES_MODULE = "modelscope_i2v.plugin.pipelines"
_PREPROCESSORS_MODULE = "modelscope_i2v.plugin.preprocessors"

INDEX_ENTRIES = {
    ("MODELS", IMAGE_TO_VIDEO, IMAGE_TO_VIDEO_MODEL): _MODELS_MODULE,
    ("MODELS", VIDEO_TO_VIDEO, VIDEO_TO_VIDEO_MODEL): _MODELS_MODULE,
    ("PIPELINES", IMAGE_TO_VIDEO, IMAGE_TO_VIDEO_PIPELINE): _PIPELINES_MODULE,
    ("PIPELINES", VIDEO_TO_VIDEO, VIDEO_TO_VIDEO_PIPELINE): _PIPELINES_MODULE,
    # A folder that holds both stages names one type, whichever task it is asked for; and one that holds only
    # the other stage shall say so.
    ("MODELS", IMAGE_TO_VIDEO, VIDEO_TO_VIDEO_MODEL): _MODELS_MODULE,
    ("MODELS", VIDEO_TO_VIDEO, IMAGE_TO_VIDEO_MODEL): _MODELS_MODULE,
    ("PIPELINES", IMAGE_TO_VIDEO, VIDEO_TO_VIDEO_PIPELINE): _PIPELINES_MODULE,
    ("PIPELINES", VIDEO_TO_VIDEO, IMAGE_TO_VIDEO_PIPELINE): _PIPELINES_MODULE,
    ("PREPROCESSORS", PREPROCESSOR_GROUP, IMAGE_TO_VIDEO_PREPROCESSOR): _PREPROCESSORS_MODULE,
    ("PREPROCESSORS", PREPROCESSOR_GROUP, VIDEO_TO_VIDEO_PREPROCESSOR): _PREPROCESSORS_MODULE,
}

# The values are ModelScope's own words for input types and output keys (InputType, OutputKeys). Spelt out,
# because importing the modules that define them would import torch.
_TASK_INPUTS = {
    IMAGE_TO_VIDEO: "image",
    VIDEO_TO_VIDEO: {
        "video_path": "video",
        "text": "text",
        "positive_prompt": "text",
        "negative_prompt": "text",
        "total_noise_levels": "number",
    },
}
_TASK_OUTPUTS = {
    IMAGE_TO_VIDEO: ["output_video"],
    VIDEO_TO_VIDEO: ["output_video"],
}
_PREPROCESSOR_MAP = {
    (IMAGE_TO_VIDEO_MODEL, IMAGE_TO_VIDEO): IMAGE_TO_VIDEO_PREPROCESSOR,
    (VIDEO_TO_VIDEO_MODEL, VIDEO_TO_VIDEO): VIDEO_TO_VIDEO_PREPROCESSOR,
}

_DECLARATIONS = (
    ("modelscope.pipeline_inputs", "TASK_INPUTS", _TASK_INPUTS),
    ("modelscope.outputs.outputs", "TASK_OUTPUTS", _TASK_OUTPUTS),
    ("modelscope.preprocessors.base", "PREPROCESSOR_MAP", _PREPROCESSOR_MAP),
)


def register_class(registry: Any, group: str, name: str) -> Any:
    """Return the class decorator with which every class of ours enters one of ModelScope's registries.

    Args:
        registry: ``MODELS``, ``PIPELINES`` or ``PREPROCESSORS`` of ModelScope.
        group: the task, or :data:`PREPROCESSOR_GROUP`.
        name: the name within the group.

    Example::

        @register_class(MODELS, IMAGE_TO_VIDEO, IMAGE_TO_VIDEO_MODEL)
        class ImageToVideoModel(TorchModel): ...
    """
    # force: a class that ModelScope ships under this name may have been imported, and registered, before.
    return registry.register_module(group, module_name=name, force=True)


def register() -> bool:
    """Repoint ModelScope's index to this package and declare the tasks, as far as ModelScope is loaded.

    May be called any number of times, from any thread.

    Returns:
        Whether the index points to this package now.
    """
    declare_tasks()
    return repoint_index()


def declare_tasks() -> None:
    """Tell ModelScope what the tasks take and give, and which preprocessor belongs to them.

    Ends its warnings that definitions are missing. A module that is not loaded is not touched.
    """
    for module_name, attribute, entries in _DECLARATIONS:
        # The attribute is missing while another thread is still importing the module.
        table = getattr(sys.modules.get(module_name), attribute, None)
        if table is not None:
            table.update(entries)


def repoint_index() -> bool:
    """Make ModelScope's lazy index name this package's modules.

    Returns:
        False if the class that holds the index is not there, else True.
    """
    lazy_module = getattr(sys.modules.get("modelscope.utils.import_utils"), "LazyImportModule", None)
    if lazy_module is None:
        return False
    index = _lazy_index(lazy_module)
    for key, module in INDEX_ENTRIES.items():
        # A new entry, not a changed one: the index holds some entries under two keys. The other fields stay
        # as they are, where there are any; they are read only when ModelScope rebuilds the index.
        index[key] = {"filepath": "", "imports": [], **index.get(key, {}), "module": module}
    return True


def _lazy_index(lazy_module: Any) -> dict:
    """The dictionary from (registry, group, name) to module that ModelScope looks classes up in."""
    get_ast_index = getattr(lazy_module, "get_ast_index", None)
    # ModelScope before 1.30 has the attribute, and no method.
    ast_index = lazy_module.AST_INDEX if get_ast_index is None else get_ast_index()
    return ast_index["index"]
