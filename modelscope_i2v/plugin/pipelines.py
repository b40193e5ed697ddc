"""ModelScope's pipelines of the two tasks: from a caller's file to a video file."""

from __future__ import annotations

import threading
from typing import Any, ClassVar, Mapping

import numpy as np
from modelscope.outputs import OutputKeys
from modelscope.pipelines.base import Pipeline
from modelscope.pipelines.builder import PIPELINES
from modelscope.utils.logger import get_logger
from torch import Tensor

from .. import __version__
from ..configuration import SETTINGS_OF_STAGE
from ..errors import InvalidInputError
from ..precision import precision_name
from ..preprocessing import to_frames
from ..progress import PhaseClock
from ..request import Request, check_keywords, keywords_of
from ..rules import integer, optional
from ..video import check_writable, encode_video, write_video
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
            raise InvalidInputError(
                f"{stage}: a model folder or a {self.model_class.__name__} is needed, got {type(model).__name__}"
            )
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
            For each input a dict: ``OutputKeys.OUTPUT_VIDEO`` is the path, or the file's bytes; ``seed``.
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
        """The generated video [B, 3, F, H, W] in about [-1, 1] under ``video``."""
        return {"video": self.model(inputs, clock=clock), "request": inputs.get("request")}

    def postprocess(
        self, inputs: Mapping[str, Any], output_video: Any = None, clock: PhaseClock | None = None
    ) -> dict[str, Any]:
        """Write the video of ``inputs`` to ``output_video``, or make its file's bytes."""
        request = inputs.get("request") or self._request({})
        clock = clock or PhaseClock()
        frames = self._frames(inputs["video"])
        metadata = self._metadata(request)
        with clock.phase("writing"):
            if output_video is None:
                video: str | bytes = encode_video(frames, request.fps, metadata)
            else:
                video = write_video(frames, output_video, request.fps, metadata)
        self._log(request, frames, clock)
        return {OutputKeys.OUTPUT_VIDEO: video, "seed": request.seed}

    @staticmethod
    def _frames(video: Tensor) -> np.ndarray:
        return to_frames(video[0])

    def _metadata(self, request: Request) -> dict[str, str]:
        width, height = request.size
        return {
            "software": f"modelscope_i2v {__version__}",
            "stage": request.stage,
            "seed": str(request.seed),
            "steps": str(request.steps),
            "guide_scale": f"{request.guide_scale:g}",
            "resolution": f"{width}x{height}",
        }

    def _log(self, request: Request, frames: np.ndarray, clock: PhaseClock) -> None:
        weight = next(self.model.generator.parameters())
        count, height, width, _ = frames.shape
        logger.info(
            f"{request.stage}: seed {request.seed}, {request.steps} steps, {count} frames of {width}x{height}, "
            f"{precision_name(weight.dtype)} on {weight.device}: {clock}"
        )


@register_class(PIPELINES, IMAGE_TO_VIDEO, IMAGE_TO_VIDEO_PIPELINE)
class ImageToVideoPipeline(StagePipeline):
    """Stage one: an image (path, URL, bytes, PIL image or BGR array) to a video of its content.

    Example::

        pipe = pipeline(task="image-to-video", model="damo/Image-to-Video", model_revision="v1.1.0")
        pipe("cat.jpg", output_video="cat.mp4", seed=7)
    """

    model_class = ImageToVideoModel
    preprocessor_class = ImageToVideoPreprocessor


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
        return super().preprocess(video, clock, **keywords)
