"""ModelScope's pipelines of the two tasks: from a caller's file to a video file."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar, Iterable, Mapping

import numpy as np
from modelscope.outputs import OutputKeys
from modelscope.pipelines.base import Pipeline
from modelscope.pipelines.builder import PIPELINES, pipeline
from modelscope.utils.logger import get_logger

from ..engine.precision import precision_name
from ..engine.progress import PhaseClock
from ..errors import ConfigurationError, InvalidInputError
from ..media.contact_sheet import contact_sheet
from ..media.preprocessing import to_frames
from ..media.video import Video, check_writable, read_video, video_bytes, write_video
from ..settings.configuration import SECOND_STAGE_SECTION, SETTINGS_OF_STAGE, read_configuration
from ..settings.record import FIRST_STAGE, from_metadata, record, to_metadata
from ..settings.request import Request, check_keywords, keywords_of
from ..settings.rules import integer, nearest, optional
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
_LOADING = ("precision", "attention", "low_memory", "compile")


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
        stage = self.model_class.stage
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
        self._one_at_a_time = threading.RLock()
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
        with self._one_at_a_time:
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
        """Parameters of ``preprocess``, ``forward`` and ``postprocess``, all checked before any work."""
        checked = check_keywords(self.model_class.stage, keywords)
        if output_video is not None:
            check_writable(output_video)
        clock = PhaseClock()
        return {**checked, "clock": clock}, {"clock": clock}, {"output_video": output_video, "clock": clock}

    def _check_input(self, input: Any) -> None:
        """Left to the preprocessor, which takes more kinds of input than ModelScope can declare."""

    def _request(self, keywords: Mapping[str, Any]) -> Request:
        chunks = {"chunk_size": self.chunk_size, "overlap_size": self.overlap_size}
        chunks = check_keywords(self.model_class.stage, chunks)
        return Request.resolve(self.model.cfg, {**self._defaults, **chunks, **keywords})

    def preprocess(self, input: Any, clock: PhaseClock | None = None, **keywords: Any) -> dict[str, Any]:
        """What the model takes, for one input, and the call's ``request``."""
        with (clock or PhaseClock()).phase("reading"):
            return {**self.preprocessor(input), "request": self._request(keywords)}

    def forward(self, inputs: Mapping[str, Any], clock: PhaseClock | None = None) -> dict[str, Any]:
        """The generated video [B, 3, F, H, W] in about [-1, 1] under ``video``, and how it was made."""
        request = inputs.get("request") or self._request({})
        video = self.model({**inputs, "request": request}, clock=clock)
        precision = precision_name(next(self.model.generator.parameters()).dtype)
        entries = record(request, self.model.model_dir, self.model.configuration_sha256, precision)
        first_stage = from_metadata(inputs.get("source_metadata", {}))
        if first_stage.get("stage") == IMAGE_TO_VIDEO:
            entries[FIRST_STAGE] = first_stage
        return {"video": video, "record": entries}

    def postprocess(
        self, inputs: Mapping[str, Any], output_video: Any = None, clock: PhaseClock | None = None
    ) -> dict[str, Any]:
        """Write the video of ``inputs`` to ``output_video``, or make its file's bytes."""
        clock = clock or PhaseClock()
        entries = inputs["record"]
        frames = to_frames(inputs["video"][0])
        with clock.phase("writing"):
            video = _saved(frames, output_video, entries)
        self._log(entries, frames, clock)
        return {OutputKeys.OUTPUT_VIDEO: video, **entries}

    def _log(self, entries: Mapping[str, Any], frames: np.ndarray, clock: PhaseClock) -> None:
        count, height, width, _ = frames.shape
        device = next(self.model.generator.parameters()).device
        logger.info(
            f"{entries['stage']}: seed {entries['seed']}, {entries['steps']} steps, "
            f"{count} frames of {width}x{height}, {entries['precision']} on {device}, "
            f"{entries['mode']}: {clock}"
        )


def _saved(frames: np.ndarray, path: Any, entries: Mapping[str, Any]) -> str | bytes:
    """The video's path, or without one its file's bytes."""
    if path is None:
        return video_bytes(frames, entries["fps"], to_metadata(entries))
    return write_video(frames, path, entries["fps"], to_metadata(entries))


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
        seeds = list(seeds)
        if not seeds:
            raise InvalidInputError("seeds: at least one is needed")
        folder = None if output_folder is None else Path(output_folder)
        results, rows = [], []
        with self._one_at_a_time:
            for seed in seeds:
                path = None if folder is None else folder / f"seed_{seed}.mp4"
                video, entries = self._generate(input, path, {**keywords, "seed": seed})
                results.append({OutputKeys.OUTPUT_VIDEO: _saved(video.frames, path, entries), **entries})
                rows.append((f"seed {seed}", video.frames))
        sheet = contact_sheet(rows)
        if folder is not None:
            sheet.save(folder / "contact_sheet.png")
        return {"videos": results, "contact_sheet": sheet}

    def _refined(self, input: Any, keep_first: Any, keywords: dict[str, Any]) -> dict[str, Any]:
        output = keywords.pop("output_video", None)
        first, second = _split_keywords(keywords)
        first_path = _first_path(keep_first, output)
        with self._one_at_a_time:
            if self._second_stage is None:
                self._second_stage = self._load_second_stage()
            self._second_stage._sanitize_parameters(output_video=output, **second)  # before any work
            video, entries = self._generate(input, first_path, first)
            kept = {"first_video": _saved(video.frames, first_path, entries)} if keep_first else {}
            return {**self._second_stage(video, output_video=output, **second), **kept}

    def generate(self, input: Any, **keywords: Any) -> Video:
        """Stage one's video in memory: what stage two takes as ``video_path`` without a file between.

        Args:
            input: the image.
            **keywords: of a call, without ``output_video``.
        """
        with self._one_at_a_time:
            return self._generate(input, None, keywords)[0]

    def _generate(self, input: Any, path: Any, keywords: Mapping[str, Any]) -> tuple[Video, dict[str, Any]]:
        """The video and its record; ``path`` is where it will be written, for an error before work."""
        for_preprocess, for_forward, _ = self._sanitize_parameters(output_video=path, **keywords)
        outputs = self.forward(self.preprocess(input, **for_preprocess), **for_forward)
        entries = outputs["record"]
        video = Video(to_frames(outputs["video"][0]), entries["fps"], to_metadata(entries))
        self._log(entries, video.frames, for_forward["clock"])
        return video, entries

    def _load_second_stage(self) -> VideoToVideoPipeline:
        options = {"device": self.device_name, **self._second_stage_settings}
        if isinstance(self._second_stage_model, str):
            second = pipeline(VIDEO_TO_VIDEO, model=self._second_stage_model, **options)
        elif SECOND_STAGE_SECTION in read_configuration(self.model.model_dir):
            second = VideoToVideoPipeline(self.model.model_dir, **options)
        else:
            raise ConfigurationError(
                f"refine: {self.model.model_dir} describes no second stage; give its folder or its id on the "
                "hub: pipeline('image-to-video', ..., refine='damo/Video-to-Video')"
            )
        second.model.share_autoencoder(self.model)
        return second


def _split_keywords(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stage one's and stage two's keywords out of those of a call for both."""
    of_first, shared = keywords_of(IMAGE_TO_VIDEO), ("seed", "fps", "callback", "progress", "generator")
    first: dict[str, Any] = {}
    second: dict[str, Any] = {name: keywords[name] for name in shared if name in keywords}
    for name, value in keywords.items():
        if name in of_first:
            first[name] = value
        else:
            second[name[len("refine_") :] if name.startswith("refine_") else name] = value
    return first, second


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

    def preprocess(self, input: Any, clock: PhaseClock | None = None, **keywords: Any) -> dict[str, Any]:
        """As of ``StagePipeline``; the input may also be a dict."""
        video = input
        if isinstance(input, Mapping):
            if "video_path" not in input:
                raise InvalidInputError(
                    f"video-to-video: the input needs the key 'video_path', got {', '.join(map(str, input))}"
                )
            video = input["video_path"]
            given = {name: input[name] for name in self.input_keys if name in input}
            keywords = {**check_keywords(VIDEO_TO_VIDEO, given), **keywords}
        if type(self.preprocessor) is VideoToVideoPreprocessor and not isinstance(video, Video):
            # One frame too many is enough for the model to refuse the video: the rest need not be read.
            with (clock or PhaseClock()).phase("reading"):
                video = read_video(video, max_frames=self.model.cfg.limit_frames + 1)
        return super().preprocess(video, clock, **keywords)
