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
    from typing import Any, Callable

IMAGE_TO_VIDEO, VIDEO_TO_VIDEO = TASKS = ("image-to-video", "video-to-video")
#: A class is registered under both tasks' names: a folder that holds both stages names one type, whichever
#: task it is asked for; and one that holds only the other stage shall say so.
MODEL_NAMES = ("image-to-video-model", "video-to-video-model")
PIPELINE_NAMES = ("image-to-video-task-pipeline", "video-to-video-pipeline")

#: Preprocessors are grouped by field, not by task; this is the field that ModelScope files both tasks under.
PREPROCESSOR_GROUP = "multi-modal"
TRAINER_GROUP = "default"  # of all trainers

#: Keys of ModelScope's index, and the module in which each has its class.
INDEX_ENTRIES = {
    **{("MODELS", task, name): "models" for task in TASKS for name in MODEL_NAMES},
    **{("PIPELINES", task, name): "pipelines" for task in TASKS for name in PIPELINE_NAMES},
    **{("PREPROCESSORS", PREPROCESSOR_GROUP, f"{task}-preprocessor"): "preprocessors" for task in TASKS},
    **{("TRAINERS", TRAINER_GROUP, f"{task}-trainer"): "trainers" for task in TASKS},
}
#: ModelScope's tables of what tasks take and give, with ours, by (module, table). The values are
#: ModelScope's own words (InputType, OutputKeys), spelt out, as importing their modules would import torch.
TABLES: dict[tuple[str, str], dict] = {
    ("modelscope.pipeline_inputs", "TASK_INPUTS"): {
        IMAGE_TO_VIDEO: "image",
        VIDEO_TO_VIDEO: {
            "video_path": "video",
            **dict.fromkeys(("text", "positive_prompt", "negative_prompt"), "text"),
            "total_noise_levels": "number",
        },
    },
    ("modelscope.outputs.outputs", "TASK_OUTPUTS"): {task: ["output_video"] for task in TASKS},
    ("modelscope.preprocessors.base", "PREPROCESSOR_MAP"): {
        (f"{task}-model", task): f"{task}-preprocessor" for task in TASKS
    },
}


def register_class(registry: Any, group: str, *names: str) -> Callable[[type], type]:
    """Return the class decorator with which every class of ours enters one of ModelScope's registries.

    Args:
        registry: ``MODELS``, ``PIPELINES``, ``PREPROCESSORS`` or ``TRAINERS`` of ModelScope.
        group: the task, :data:`PREPROCESSOR_GROUP` or :data:`TRAINER_GROUP`.
        names: within the group.
    """

    def decorate(each: type) -> type:
        for name in names:
            # force: a class that ModelScope ships under this name may have been registered before.
            registry.register_module(group, module_name=name, force=True)(each)
        return each

    return decorate


def register() -> bool:
    """Repoint ModelScope's index to this package and declare the tasks, as far as ModelScope is loaded.

    May be called any number of times, from any thread.

    Returns:
        Whether the index points to this package now.
    """
    for (module, table), entries in TABLES.items():
        # The table is missing while another thread is still importing the module.
        getattr(sys.modules.get(module), table, {}).update(entries)
    lazy_module = getattr(sys.modules.get("modelscope.utils.import_utils"), "LazyImportModule", None)
    if lazy_module is None:
        return False
    # ModelScope before 1.30 has the attribute, and no method.
    get_ast_index = getattr(lazy_module, "get_ast_index", lambda: lazy_module.AST_INDEX)
    index = get_ast_index()["index"]
    for key, module in INDEX_ENTRIES.items():
        # A new entry, not a changed one: the index holds some entries under two keys. The other fields stay
        # as they are, where there are any; they are read only when ModelScope rebuilds the index.
        entry = {"filepath": "", "imports": [], **index.get(key, {})}
        index[key] = {**entry, "module": f"modelscope_i2v.plugin.{module}"}
    return True
