"""ModelScope's pipelines of the two tasks: from a caller's file to a video file."""

from __future__ import annotations

import io
import os
from typing import Any, ClassVar, Iterable, Iterator, Mapping

from modelscope.outputs import OutputKeys
from modelscope.pipelines.base import Pipeline
from modelscope.pipelines.builder import PIPELINES, pipeline
from modelscope.utils.logger import get_logger

from ..engine.devices import device_of
from ..engine.generated import GeneratedVideo
from ..engine.previews import generate_previews
from ..engine.progress import Progress
from ..engine.two_stages import describes_second_stage
from ..errors import ConfigurationError, InvalidInputError, describe
from ..media.files import local_path
from ..settings.keywords import check_keywords, keywords_of, split_keywords
from ..settings.request import Request
from ..settings.rules import integer, nearest, optional
from ..settings.stages import SETTINGS_OF_STAGE, loading_settings
from .models import ImageToVideoModel, StageModel, VideoToVideoModel
from .outputs import Output, resolve_outputs
from .preprocessors import PROMPT_KEYS, ImageToVideoPreprocessor, VideoToVideoPreprocessor, split_prompts
from .registration import (
    IMAGE_TO_VIDEO,
    IMAGE_TO_VIDEO_PIPELINE,
    VIDEO_TO_VIDEO,
    VIDEO_TO_VIDEO_PIPELINE,
    register_class,
)

logger = get_logger()

#: Settings that concern how a stage is loaded.
_LOADING = tuple(loading_settings())


class StagePipeline(Pipeline):
    """What both stages' pipelines have in common.

    ModelScope's service reads the methods' signatures from the source of a subclass: what stands there has no
    keyword-only parameters, and no parameter beyond the input that a client may not give.

    ``chunk_size`` and ``overlap_size`` (frames, None for the default) say how a long video goes through the
    network: see ``modelscope_i2v.samplers.windows.windowed``.
    """

    model_class: ClassVar[type[StageModel]]
    preprocessor_class: ClassVar[type]

    def __init__(self, model: str | StageModel, preprocessor: Any = None, device: str = "gpu", **kwargs: Any):
        """Build the pipeline of a model folder or of a model.

        Args:
            model: the folder, or a model of this stage.
            preprocessor: instead of the stage's own.
            device: as ModelScope names it; without a GPU, ``gpu`` is the CPU.
            **kwargs: settings and call keywords, which go before those of the folder's file.
        """
        stage = self.model_class.stage_class.name
        declared = SETTINGS_OF_STAGE[stage].declared()
        aliases = {each.alias: name for name, each in declared.items() if each.alias}
        kwargs = {aliases.get(name, name): value for name, value in kwargs.items()}
        settings = {name: kwargs.pop(name) for name in SETTINGS_OF_STAGE[stage].names() if name in kwargs}
        defaults = {name: kwargs.pop(name) for name in keywords_of(stage) if name in kwargs}
        if isinstance(model, str):
            self._defaults = check_keywords(stage, defaults)
            model = self.model_class(model, device=device, **settings)
        elif isinstance(model, self.model_class):
            self._defaults = check_keywords(stage, {**settings, **defaults})
        else:
            needed, got = self.model_class.__name__, type(model).__name__
            raise InvalidInputError(f"{stage}: a model folder or a {needed} is needed, got {got}")
        for name in kwargs:  # ModelScope's own, or a slip of the pen
            near = nearest(name, [*model.cfg.names(), *keywords_of(stage)])
            if near is not None:
                logger.warning(
                    f"{stage}: the keyword {name!r} is ModelScope's or unknown; did you mean {near!r}?"
                )
        kwargs.pop("auto_collate", None)
        if preprocessor is None:
            preprocessor = self.preprocessor_class(transform=model.vid_trans)
        super().__init__(model=model, preprocessor=preprocessor, device=device, auto_collate=False, **kwargs)
        self._model_prepare = True  # the model is where it shall be; its parts may be moved by hand
        self.chunk_size: int | None = None
        self.overlap_size: int | None = None

    def __call__(self, input: Any, *args: Any, **keywords: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """Generate a video, or a list of videos from a list of inputs.

        Args:
            input: what the stage takes, or a list, tuple or iterator of such.
            output_video: the path to write to (for several inputs, a list of as many), or None for bytes.
            batch_size: accepted; each input is generated on its own, so that it gives the same video alone.
            **keywords: ``seed``, ``steps``, ``guide_scale``, ``max_frames``, ``resolution`` (width, height),
                ``fps``, ``callback``, ``generator``, ``progress``, and stage two's ``text`` and others.

        Returns:
            For each input a dict: ``OutputKeys.OUTPUT_VIDEO`` is the path, or the file's bytes; beside it how
            the video was made, under the names of ``modelscope_i2v.settings.record.record``.
        """
        _drop_batch_size(keywords)
        inputs = _several(input)
        if inputs is None:
            return super().__call__(input, *args, **keywords)
        outputs = resolve_outputs(_names("output_video", keywords.pop("output_video", None), len(inputs)))
        self._sanitize_parameters(**keywords)  # before the first is generated
        return [
            super(StagePipeline, self).__call__(item, *args, output_video=output, **keywords)
            for item, output in zip(inputs, outputs)
        ]

    def _sanitize_parameters(self, output_video: Any = None, **keywords: Any) -> tuple[dict, dict, dict]:
        """Return the parameters of the three steps below, checked before any work."""
        checked = check_keywords(self.model_class.stage_class.name, keywords)
        [output] = resolve_outputs([output_video])
        return checked, {}, {"output_video": output}

    def _check_input(self, input: Any) -> None:
        """Left to the preprocessor, which takes more kinds of input than ModelScope can declare."""

    def _with_defaults(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's keywords over ``chunk_size`` and ``overlap_size`` over the pipeline's own."""
        windows = {"chunk_size": self.chunk_size, "overlap_size": self.overlap_size}
        windows = check_keywords(self.model_class.stage_class.name, windows)  # without those that are None
        return {**self._defaults, **windows, **keywords}

    def _resolve(self, keywords: Mapping[str, Any]) -> tuple[Request, Progress]:
        return self.model.stage.resolve(self._with_defaults(keywords))

    def preprocess(self, input: Any, **keywords: Any) -> dict[str, Any]:
        """Return what the model takes for one input, with the call's ``request`` and ``progress``."""
        request, progress = self._resolve(keywords)
        with progress.phase("reading"):
            return {**self.preprocessor(input), "request": request, "progress": progress}

    def forward(self, inputs: Mapping[str, Any]) -> GeneratedVideo:
        """Generate the video of a preprocessed input."""
        if "request" not in inputs:
            request, progress = self._resolve({name: inputs[name] for name in PROMPT_KEYS if name in inputs})
            inputs = {**inputs, "request": request, "progress": progress}
        return self._generate(inputs)

    def postprocess(self, inputs: GeneratedVideo, output_video: Any = None) -> dict[str, Any]:
        """Write a generated video to ``output_video``, or make its file's bytes."""
        [output] = resolve_outputs([output_video])
        return self._result(inputs, output)

    def _result(self, video: GeneratedVideo, output: Output | None) -> dict[str, Any]:
        progress = Progress()
        with progress.phase("writing"):
            if output is None:
                file: str | bytes = video.to_bytes()
            else:
                video.save(output.path)
                file = output.name
        progress.seconds = {**video.seconds, **progress.seconds}
        count, height, width, _ = video.frames.shape
        record, device = video.record, device_of(self.model.generator)
        logger.info(
            f"{record['stage']}: seed {record['seed']}, {record['steps']} steps, {count} frames of "
            f"{width}x{height}, {record['precision']} on {device}, {record['mode']}: {progress}"
        )
        return {OutputKeys.OUTPUT_VIDEO: file, **record}


def _drop_batch_size(keywords: dict[str, Any]) -> None:
    optional(integer(1, 1024)).check("batch_size", keywords.pop("batch_size", None), InvalidInputError)


def _several(input: Any) -> list[Any] | None:
    """Return the inputs of a list, a tuple or an iterator, None for one input."""
    several = isinstance(input, (list, tuple, Iterator)) and not isinstance(input, io.IOBase)
    return list(input) if several else None


def _names(keyword: str, names: Any, count: int) -> list[Any]:
    """Return the names of so many files."""
    if names is None:
        return [None] * count
    if not isinstance(names, (list, tuple)) or len(names) != count:
        allowed = "True or " if keyword == "keep_first" else ""
        raise InvalidInputError(
            f"{keyword}: for a list of {count} inputs {allowed}a list of {count} paths is needed, "
            f"got {describe(names)}"
        )
    return list(names)


@register_class(PIPELINES, IMAGE_TO_VIDEO, VIDEO_TO_VIDEO_PIPELINE)
@register_class(PIPELINES, IMAGE_TO_VIDEO, IMAGE_TO_VIDEO_PIPELINE)
class ImageToVideoPipeline(StagePipeline):
    """Stage one: an image (path, URL, bytes, PIL image or BGR array) to a video of its content.

    Example::

        pipe = pipeline(task="image-to-video", model="damo/Image-to-Video", model_revision="v1.1.0")
        pipe("cat.jpg", output_video="cat.mp4", seed=7)
    """

    model_class = ImageToVideoModel
    preprocessor_class = ImageToVideoPreprocessor

    def __init__(self, model: str | ImageToVideoModel, *args: Any, refine: str | bool = False, **kwargs: Any):
        """As of ``StagePipeline``.

        Args:
            refine: stage two's model, for calls with ``refine=True``: a folder or an id on the hub. By
                default it is the one that the folder's own file describes, if it does.
        """
        self._second_stage_model = refine
        # Stage two is loaded with what concerns loading; the rest is each call's to say.
        self._second_stage_settings = {key: kwargs[key] for key in _LOADING if key in kwargs}
        self._second_stage: VideoToVideoPipeline | None = None
        super().__init__(model, *args, **kwargs)
        if refine:
            self._second_stage = self._load_second_stage()

    def __call__(self, input: Any, *args: Any, **keywords: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """Do as ``StagePipeline`` does; with ``refine``, both stages.

        Args:
            refine: whether the result is stage two's video of stage one's frames. Keywords that only stage
                two has, such as ``text``, then go to it, and any of its own with ``refine_`` before the name
                (``refine_steps``, ``refine_resolution``, ...); ``seed`` and the others go to stage one, and
                ``seed``, ``fps``, ``callback``, ``progress`` and ``generator`` to both.
            keep_first: with ``refine``, stage one's video too: True for a file beside the output, named
                ``*.i2v.mp4``, or a path (for several inputs, a list of as many); returned as ``first_video``.
        """
        refine, keep_first = keywords.pop("refine", False), keywords.pop("keep_first", None)
        if not refine:
            return super().__call__(input, *args, **keywords)
        _drop_batch_size(keywords)
        inputs, names = _several(input), keywords.pop("output_video", None)
        if inputs is None:
            first_names = keep_first if keep_first in (None, True, False) else [keep_first]
            return self._refined([input], [names], first_names, keywords)[0]
        return self._refined(inputs, _names("output_video", names, len(inputs)), keep_first, keywords)

    def preview(
        self, input: Any, seeds: Iterable[int], output_folder: Any = None, **keywords: Any
    ) -> dict[str, Any]:
        """Stage-one videos of several seeds, to choose the seed of the one to refine.

        Args:
            input: the image.
            seeds: one for each video.
            output_folder: where to write ``seed_N.mp4`` and ``contact_sheet.png``; without it nothing is.
            **keywords: of a call.

        Returns:
            ``videos``: the results, one for each seed; ``contact_sheet``: a PIL image of all of them.
        """
        folder = None if output_folder is None else os.path.join(os.getcwd(), local_path(output_folder))
        seeds, stage = list(seeds), self.model.stage
        videos, sheet = generate_previews(stage, input, seeds, folder, **self._with_defaults(keywords))
        outputs = [
            video.to_bytes() if folder is None else os.path.join(folder, f"seed_{seed}.mp4")
            for seed, video in zip(seeds, videos)
        ]
        results = [{OutputKeys.OUTPUT_VIDEO: o, **v.record} for o, v in zip(outputs, videos)]
        return {"videos": results, "contact_sheet": sheet}

    def generate(self, input: Any, **keywords: Any) -> GeneratedVideo:
        """Generate stage one's video in memory: stage two takes it as ``video_path``.

        Args:
            input: the image.
            **keywords: those of a call, without ``output_video``.
        """
        for_preprocess, _, _ = self._sanitize_parameters(**keywords)
        return self.forward(self.preprocess(input, **for_preprocess))

    def _generate(self, inputs: Mapping[str, Any]) -> GeneratedVideo:
        return self.model.stage.generate(inputs["vit_frame"], inputs["request"], inputs["progress"])

    def _refined(
        self, inputs: list[Any], names: list[Any], keep_first: Any, keywords: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return stage two's videos of the inputs; ``keep_first`` is true, false or as many names."""
        if keep_first is True:
            first_names = [name and os.path.splitext(local_path(name))[0] + ".i2v.mp4" for name in names]
        else:
            first_names = _names("keep_first", keep_first or None, len(inputs))
        outputs = resolve_outputs([*names, *first_names])
        first_keywords, second_keywords = split_keywords(keywords)
        if self._second_stage is None:
            self._second_stage = self._load_second_stage()
        # Before any work.
        self._sanitize_parameters(**first_keywords)
        self._second_stage._sanitize_parameters(**second_keywords)
        self._second_stage._resolve({**second_keywords, "generator": None})  # which a request would draw from
        results = []
        for input, output, first_output in zip(inputs, outputs, outputs[len(inputs) :]):
            video = self.generate(input, **first_keywords)
            kept = self._result(video, first_output) if keep_first is True or first_output else {}
            result: Any = self._second_stage(video, output_video=output, **second_keywords)
            if kept:
                result["first_video"] = kept[OutputKeys.OUTPUT_VIDEO]
            results.append(result)
        return results

    def _load_second_stage(self) -> VideoToVideoPipeline:
        options = {"device": self.device_name, **self._second_stage_settings}
        if isinstance(self._second_stage_model, str):
            second = pipeline(VIDEO_TO_VIDEO, model=self._second_stage_model, **options)
        elif describes_second_stage(self.model.model_dir):
            second = VideoToVideoPipeline(self.model.model_dir, **options)
        else:
            raise ConfigurationError(
                f"refine: {self.model.model_dir} describes no second stage; give its folder or its id on the "
                "hub: pipeline('image-to-video', ..., refine='damo/Video-to-Video')"
            )
        second.model.stage.share_autoencoder(self.model.stage)
        return second


@register_class(PIPELINES, VIDEO_TO_VIDEO, IMAGE_TO_VIDEO_PIPELINE)
@register_class(PIPELINES, VIDEO_TO_VIDEO, VIDEO_TO_VIDEO_PIPELINE)
class VideoToVideoPipeline(StagePipeline):
    """Stage two: a video and, if wanted, a text, to a larger, sharper video.

    Takes ``{"video_path": path, URL or bytes}`` with, if wanted, ``text``, ``positive_prompt``,
    ``negative_prompt`` and ``total_noise_levels``; or the video alone. Further keys are left alone.

    Example::

        pipe = pipeline(task="video-to-video", model="damo/Video-to-Video", model_revision="v1.1.0")
        pipe({"video_path": "cat.mp4", "text": "a cat"}, output_video="cat_720p.mp4")
    """

    model_class = VideoToVideoModel
    preprocessor_class = VideoToVideoPreprocessor

    def _sanitize_parameters(self, output_video: Any = None, **keywords: Any) -> tuple[dict, dict, dict]:
        """As of ``StagePipeline``; a call's frames are read only as they are encoded."""
        for_preprocess, for_forward, for_postprocess = super()._sanitize_parameters(output_video, **keywords)
        return {**for_preprocess, "streamed": True}, for_forward, for_postprocess

    def preprocess(self, input: Any, **keywords: Any) -> dict[str, Any]:
        """Return what the model takes for one input, which may also be a dict.

        Args:
            input: the video, alone or as ``video_path`` in a dict; a keyword precedes what else is in it.
            **keywords: those of a call; ``streamed``: give the ``video`` as it is, to be read frame by frame,
                instead of ``video_data``.
        """
        streamed = keywords.pop("streamed", False)
        video, prompts = split_prompts(input)
        keywords = {**check_keywords(VIDEO_TO_VIDEO, prompts), **keywords}
        if not streamed or type(self.preprocessor) is not VideoToVideoPreprocessor:
            return super().preprocess(video, **keywords)
        request, progress = self._resolve(keywords)
        return {"video": video, "request": request, "progress": progress}

    def _generate(self, inputs: Mapping[str, Any]) -> GeneratedVideo:
        stage, request, progress = self.model.stage, inputs["request"], inputs["progress"]
        if "video" in inputs:
            return stage.generate(inputs["video"], request, progress)
        metadata = inputs.get("source_metadata", {})
        return stage.generate_from_frames(inputs["video_data"], metadata, request, progress)
