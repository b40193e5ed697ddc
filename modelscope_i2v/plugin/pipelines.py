"""ModelScope's pipelines of the two tasks: from a caller's file to a video file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Iterable, Mapping

from modelscope.outputs import OutputKeys
from modelscope.pipelines.base import Pipeline
from modelscope.pipelines.builder import PIPELINES, pipeline
from modelscope.utils.logger import get_logger

from ..engine.devices import device_of
from ..engine.generated import GeneratedVideo
from ..engine.progress import Progress
from ..engine.two_stages import describes_second_stage
from ..errors import ConfigurationError, InvalidInputError
from ..media.contact_sheet import contact_sheet
from ..media.video import check_writable
from ..settings.configuration import SETTINGS_OF_STAGE
from ..settings.keywords import check_keywords, keywords_of, split_keywords
from ..settings.request import Request
from ..settings.rules import integer, nearest, optional
from ..settings.stages import loading_settings
from .models import ImageToVideoModel, StageModel, VideoToVideoModel
from .preprocessors import ImageToVideoPreprocessor, VideoToVideoPreprocessor
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

    ``chunk_size`` and ``overlap_size`` (frames, None for the default) say how a long video goes through the
    network: see ``modelscope_i2v.samplers.velocity.windowed``.
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
            input: what the stage takes, or a list of such.
            output_video: the path to write to (for a list of inputs, a list of as many), or None for bytes.
            batch_size: accepted; each input is generated on its own, so that it gives the same video alone.
            **keywords: ``seed``, ``steps``, ``guide_scale``, ``max_frames``, ``resolution`` (width, height),
                ``fps``, ``callback``, ``generator``, ``progress``, and stage two's ``text`` and others.

        Returns:
            For each input a dict: ``OutputKeys.OUTPUT_VIDEO`` is the path, or the file's bytes; beside it how
            the video was made, under the names of ``modelscope_i2v.settings.record.record``.
        """
        optional(integer(1, 1024)).check("batch_size", keywords.pop("batch_size", None), InvalidInputError)
        if not isinstance(input, list):
            return super().__call__(input, *args, **keywords)
        paths = self._output_paths(keywords.pop("output_video", None), len(input))
        for path in paths:
            self._sanitize_parameters(output_video=path, **keywords)  # before the first is generated
        return [
            super(StagePipeline, self).__call__(item, *args, output_video=path, **keywords)
            for item, path in zip(input, paths)
        ]

    @staticmethod
    def _output_paths(given: Any, count: int) -> list[Any]:
        if given is None:
            return [None] * count
        if not isinstance(given, (list, tuple)) or len(given) != count:
            raise InvalidInputError(
                f"output_video: for a list of {count} inputs a list of {count} paths is needed, got {given!r}"
            )
        return list(given)

    def _sanitize_parameters(self, output_video: Any = None, **keywords: Any) -> tuple[dict, dict, dict]:
        """Return the parameters of the three steps below, checked before any work."""
        checked = check_keywords(self.model_class.stage_class.name, keywords)
        if output_video is not None:
            check_writable(output_video)
        return checked, {}, {"output_video": output_video}

    def _check_input(self, input: Any) -> None:
        """Left to the preprocessor, which takes more kinds of input than ModelScope can declare."""

    def _resolve(self, keywords: Mapping[str, Any]) -> tuple[Request, Progress]:
        windows = {"chunk_size": self.chunk_size, "overlap_size": self.overlap_size}
        windows = check_keywords(self.model_class.stage_class.name, windows)  # without those that are None
        return self.model.stage.resolve({**self._defaults, **windows, **keywords})

    def preprocess(self, input: Any, **keywords: Any) -> dict[str, Any]:
        """Return what the model takes for one input, with the call's ``request`` and ``progress``."""
        request, progress = self._resolve(keywords)
        with progress.phase("reading"):
            return {**self.preprocessor(input), "request": request, "progress": progress}

    def forward(self, inputs: Mapping[str, Any]) -> GeneratedVideo:
        """Generate the video of a preprocessed input."""
        if "request" not in inputs:
            request, progress = self._resolve({})
            inputs = {**inputs, "request": request, "progress": progress}
        return self._generate(inputs)

    def postprocess(self, inputs: GeneratedVideo, output_video: Any = None) -> dict[str, Any]:
        """Write a generated video to ``output_video``, or make its file's bytes."""
        return self._result(inputs, output_video)

    def _result(self, video: GeneratedVideo, path: Any) -> dict[str, Any]:
        progress = Progress()
        with progress.phase("writing"):
            output = video.to_bytes() if path is None else video.save(path)
        progress.seconds = {**video.seconds, **progress.seconds}
        count, height, width, _ = video.frames.shape
        record, device = video.record, device_of(self.model.generator)
        logger.info(
            f"{record['stage']}: seed {record['seed']}, {record['steps']} steps, {count} frames of "
            f"{width}x{height}, {record['precision']} on {device}, {record['mode']}: {progress}"
        )
        return {OutputKeys.OUTPUT_VIDEO: output, **record}


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

    def __call__(
        self, input: Any, *args: Any, refine: bool = False, keep_first: Any = False, **keywords: Any
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """As of ``StagePipeline``; with ``refine``, both stages.

        Args:
            refine: whether the result is stage two's video of stage one's frames. Keywords that only stage
                two has, such as ``text``, then go to it, and any of its own with ``refine_`` before the name
                (``refine_steps``, ``refine_resolution``, ...); ``seed`` and the others go to stage one, and
                ``seed``, ``fps``, ``callback``, ``progress`` and ``generator`` to both.
            keep_first: with ``refine``, stage one's video too: True for a file beside the output, named
                ``*.i2v.mp4``, or a path; returned as ``first_video``.
        """
        if not refine:
            return super().__call__(input, *args, **keywords)
        if not isinstance(input, list):
            return self._refined(input, keep_first, keywords)
        paths = self._output_paths(keywords.pop("output_video", None), len(input))
        return [
            self._refined(item, keep_first, {**keywords, "output_video": path})
            for item, path in zip(input, paths)
        ]

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
        folder = None if output_folder is None else Path(output_folder)
        seeds = list(seeds)
        if not seeds:
            raise InvalidInputError("seeds: at least one is needed")
        paths = [None if folder is None else folder / f"seed_{seed}.mp4" for seed in seeds]
        for path in paths:
            self._sanitize_parameters(output_video=path, **keywords)  # before the first is generated
        results, rows = [], []
        for seed, path in zip(seeds, paths):
            video = self.generate(input, **{**keywords, "seed": seed})
            results.append(self._result(video, path))
            rows.append((f"seed {seed}", video.frames))
        sheet = contact_sheet(rows)
        if folder is not None:
            sheet.save(folder / "contact_sheet.png")
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

    def _refined(self, input: Any, keep_first: Any, keywords: dict[str, Any]) -> dict[str, Any]:
        output = keywords.pop("output_video", None)
        first_keywords, second_keywords = split_keywords(keywords)
        first_path = _first_path(keep_first, output)
        if self._second_stage is None:
            self._second_stage = self._load_second_stage()
        # Before any work.
        self._second_stage._sanitize_parameters(output_video=output, **second_keywords)
        self._sanitize_parameters(output_video=first_path, **first_keywords)
        video = self.generate(input, **first_keywords)
        kept = self._result(video, first_path) if keep_first else {}
        result = self._second_stage(video, output_video=output, **second_keywords)
        return {**result, "first_video": kept[OutputKeys.OUTPUT_VIDEO]} if kept else result

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


def _first_path(keep_first: Any, output: Any) -> str | None:
    """Where stage one's video goes; None for nowhere, or for bytes."""
    if not keep_first or (keep_first is True and output is None):
        return None
    return str(Path(output).with_suffix(".i2v.mp4")) if keep_first is True else str(keep_first)


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

    #: What may stand in the input dict beside the video; a keyword of the call goes before it.
    input_keys = ("text", "positive_prompt", "negative_prompt", "total_noise_levels")

    def _sanitize_parameters(self, output_video: Any = None, **keywords: Any) -> tuple[dict, dict, dict]:
        """As of ``StagePipeline``; a call's frames are read only as they are encoded."""
        for_preprocess, *others = super()._sanitize_parameters(output_video, **keywords)
        return ({**for_preprocess, "streamed": True}, *others)

    def preprocess(self, input: Any, streamed: bool = False, **keywords: Any) -> dict[str, Any]:
        """Return what the model takes for one input, which may also be a dict.

        Args:
            input: the video, alone or as ``video_path`` in a dict.
            streamed: give the ``video`` as it is, to be read frame by frame, instead of ``video_data``.
            **keywords: those of a call.
        """
        video = input
        if isinstance(input, Mapping):
            if "video_path" not in input:
                raise InvalidInputError(
                    f"video-to-video: the input needs the key 'video_path', got {', '.join(map(str, input))}"
                )
            video = input["video_path"]
            in_dict = {name: input[name] for name in self.input_keys if name in input}
            keywords = {**check_keywords(VIDEO_TO_VIDEO, in_dict), **keywords}
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
