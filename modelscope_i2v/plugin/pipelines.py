"""ModelScope's pipelines of the two tasks: from a caller's file to a video file."""

from __future__ import annotations

import io
import os
import threading
from typing import Any, ClassVar, Iterable, Iterator, Mapping

from modelscope.outputs import OutputKeys
from modelscope.pipelines.base import Pipeline
from modelscope.pipelines.builder import PIPELINES, pipeline
from modelscope.utils.logger import get_logger

from ..engine.devices import device_of
from ..engine.generated import GeneratedVideo, encoding_of
from ..engine.previews import generate_previews
from ..engine.progress import Progress
from ..engine.two_stages import describes_second_stage
from ..errors import ConfigurationError, InvalidInputError, describe
from ..media.files import local_path
from ..media.video import check_writable
from ..settings.keywords import check_keywords, keywords_of, split_keywords
from ..settings.request import Request
from ..settings.rules import integer, nearest, optional
from ..settings.stages import SETTINGS_OF_STAGE, loading_settings
from .models import ImageToVideoModel, StageModel, VideoToVideoModel
from .outputs import resolve_outputs
from .preprocessors import PROMPT_KEYS, ImageToVideoPreprocessor, VideoToVideoPreprocessor, split_prompts
from .registration import IMAGE_TO_VIDEO, PIPELINE_NAMES, VIDEO_TO_VIDEO, register_class

logger = get_logger()


class StagePipeline(Pipeline):
    """A pipeline of one stage: ModelScope's call as the engine's, and the engine's video as a file.

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
        self.chunk_size: int | None = self._defaults.pop("chunk_size", None)
        self.overlap_size: int | None = self._defaults.pop("overlap_size", None)

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
        several = isinstance(input, (list, tuple, Iterator)) and not isinstance(input, io.IOBase)
        inputs = list(input) if several else [input]
        batch_size = keywords.pop("batch_size", None)
        optional(integer(1, 1024)).check("batch_size", batch_size, InvalidInputError)
        for keyword in ("output_video", "keep_first"):
            if keyword in keywords:
                keywords[keyword] = _names(keyword, keywords[keyword], len(inputs) if several else None)
        results = self._generate_all(inputs, *args, **keywords)
        return results if several else results[0]

    def _generate_all(self, inputs: list[Any], *args: Any, **keywords: Any) -> list[dict[str, Any]]:
        """Return the results of inputs; ``output_video`` has as many names."""
        outputs = resolve_outputs(keywords.pop("output_video", None) or [None] * len(inputs))
        self._sanitize_parameters(**keywords)  # before the first is generated
        call = super().__call__
        return [call(item, *args, output_video=output, **keywords) for item, output in zip(inputs, outputs)]

    def _sanitize_parameters(self, output_video: Any = None, **keywords: Any) -> tuple[dict, dict, dict]:
        """Return the parameters of the three steps below, checked before any work."""
        checked = check_keywords(self.model_class.stage_class.name, keywords)
        return checked, {}, {"output_video": resolve_outputs([output_video])[0]}

    def _check_input(self, input: Any) -> None:
        """Left to the preprocessor, which takes more kinds of input than ModelScope can declare."""

    def _with_defaults(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's keywords over ``chunk_size`` and ``overlap_size`` over the pipeline's own."""
        windows = {"chunk_size": self.chunk_size, "overlap_size": self.overlap_size}
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
        progress = Progress()
        with progress.phase("writing"):
            file = inputs.to_bytes() if output is None else inputs.save(output.path)
        progress.seconds = {**inputs.seconds, **progress.seconds}
        count, height, width, _ = inputs.frames.shape
        record, device = inputs.record, device_of(self.model.generator)
        logger.info(
            f"{record['stage']}: seed {record['seed']}, {record['steps']} steps, {count} frames of "
            f"{width}x{height}, {record['precision']} on {device}, {record['mode']}: {progress}"
        )
        return {OutputKeys.OUTPUT_VIDEO: file if output is None else output.name, **record}


def _names(keyword: str, names: Any, count: int | None) -> Any:
    """Return as many names as there are inputs, None for one that is no list; flags as they are."""
    if names is None or (keyword == "keep_first" and isinstance(names, bool)):
        return names
    if count is None:
        return [names]
    if not isinstance(names, (list, tuple)) or len(names) != count:
        allowed = "True or " if keyword == "keep_first" else ""
        raise InvalidInputError(
            f"{keyword}: for a list of {count} inputs {allowed}a list of {count} paths is needed, "
            f"got {describe(names)}"
        )
    return list(names)


@register_class(PIPELINES, IMAGE_TO_VIDEO, *PIPELINE_NAMES)
class ImageToVideoPipeline(StagePipeline):
    """Stage one: an image (path, URL, bytes, PIL image or BGR array) to a video of its content.

    A call also takes:

    ``refine``: whether the result is stage two's video of stage one's frames. Keywords that only stage two
    has, such as ``text``, then go to it, and any of its own with ``refine_`` before the name
    (``refine_steps``, ``refine_resolution``, ...); ``seed`` and the others go to stage one, and ``seed``,
    ``fps``, ``callback``, ``progress`` and ``generator`` to both.

    ``keep_first``: with ``refine``, stage one's video too: True for a file beside the output, named
    ``*.i2v.mp4``, or a path (for several inputs, a list of as many); returned as ``first_video``.

    Example::

        pipe = pipeline(task="image-to-video", model="damo/Image-to-Video", model_revision="v1.1.0")
        pipe("cat.jpg", output_video="cat.mp4", seed=7)
    """

    model_class = ImageToVideoModel
    preprocessor_class = ImageToVideoPreprocessor

    def __init__(self, model: str | ImageToVideoModel, *args: Any, refine: str | bool = False, **kwargs: Any):
        """Build the pipeline as ``StagePipeline`` does.

        Args:
            refine: stage two's model, for calls with ``refine=True``: a folder or an id on the hub. By
                default it is the one that the folder's own file describes, if it does.
        """
        self._second_stage_model = refine
        # Stage two is loaded with what concerns loading; the rest is each call's to say.
        self._second_stage_settings = {key: kwargs[key] for key in loading_settings() if key in kwargs}
        self._second_stage: VideoToVideoPipeline | None = None
        self._loading = threading.Lock()
        super().__init__(model, *args, **kwargs)
        if refine:
            self._load_second_stage()

    def _generate_all(self, inputs: list[Any], *args: Any, **keywords: Any) -> list[dict[str, Any]]:
        refine, keep_first = keywords.pop("refine", False), keywords.pop("keep_first", None)
        if not refine:
            return super()._generate_all(inputs, *args, **keywords)
        names = keywords.pop("output_video", None) or [None] * len(inputs)
        first_names = keep_first or [None] * len(inputs)
        if keep_first is True:
            first_names = [name and os.path.splitext(local_path(name))[0] + ".i2v.mp4" for name in names]
        outputs = resolve_outputs([*names, *first_names])
        first_keywords, second_keywords = split_keywords(keywords)
        second = self._load_second_stage()
        # Before any work, and without a draw from a generator, which stage one comes first to.
        for pipe, given in ((self, first_keywords), (second, second_keywords)):
            pipe._resolve({**given, "generator": None})
        results: list[dict[str, Any]] = []
        for input, output, first_output in zip(inputs, outputs, outputs[len(inputs) :]):
            video = self.generate(input, **first_keywords)
            kept = self.postprocess(video, first_output) if keep_first is True or first_output else None
            results += second._generate_all([video], output_video=[output], **second_keywords)
            if kept is not None:
                results[-1]["first_video"] = kept[OutputKeys.OUTPUT_VIDEO]
        return results

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
        results = []
        for seed, video in zip(seeds, videos):
            file = video.to_bytes() if folder is None else os.path.join(folder, f"seed_{seed}.mp4")
            results.append({OutputKeys.OUTPUT_VIDEO: file, **video.record})
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

    def _load_second_stage(self) -> VideoToVideoPipeline:
        """Return stage two's pipeline, loaded by the first call that needs it."""
        with self._loading:
            if self._second_stage is None:
                options = {"device": self.device_name, **self._second_stage_settings}
                if isinstance(self._second_stage_model, str):
                    second = pipeline(VIDEO_TO_VIDEO, model=self._second_stage_model, **options)
                elif describes_second_stage(self.model.model_dir):
                    second = VideoToVideoPipeline(self.model.model_dir, **options)
                else:
                    words = "describes no second stage; give its folder or its id on the hub"
                    example = "pipeline('image-to-video', ..., refine='damo/Video-to-Video')"
                    raise ConfigurationError(f"refine: {self.model.model_dir} {words}: {example}")
                second.model.stage.share_autoencoder(self.model.stage)
                self._second_stage = second
            return self._second_stage


@register_class(PIPELINES, VIDEO_TO_VIDEO, *PIPELINE_NAMES)
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
        """Return the parameters as ``StagePipeline`` does; frames are then read only as they are encoded."""
        for_preprocess, for_forward, for_postprocess = super()._sanitize_parameters(output_video, **keywords)
        if (output := for_postprocess["output_video"]) is not None:
            # Without the generator, which a request would draw from.
            request, _ = self._resolve({**for_preprocess, "generator": None})
            check_writable(output.path, encoding_of(request))
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
