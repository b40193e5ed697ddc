"""ModelScope's models of the two tasks: stages of the engine under the published models' names."""

from __future__ import annotations

from typing import Any, ClassVar, Mapping

import torch
from modelscope.models.base import TorchModel
from modelscope.models.builder import MODELS
from modelscope.utils.device import create_device
from torch import Tensor

from ..engine.image_to_video import ImageToVideo
from ..engine.stage import Stage
from ..engine.video_to_video import VideoToVideo
from ..errors import InvalidInputError
from ..settings.stages import SETTINGS_OF_STAGE
from .preprocessors import PROMPT_KEYS
from .registration import IMAGE_TO_VIDEO, MODEL_NAMES, VIDEO_TO_VIDEO, register_class


class StageModel(TorchModel):
    """A stage of the engine as a ModelScope model.

    Attributes:
        stage: the engine's. What ``stage_attributes`` names is its own, to read and to assign.
    """

    stage_class: ClassVar[type[Stage]]

    #: The stage's attributes, by the published models' names for them.
    stage_attributes: ClassVar[Mapping[str, str]] = {
        "generator": "unet",
        "autoencoder": "autoencoder",
        "clip_encoder": "clip_encoder",
        "diffusion": "schedule",
        "vid_trans": "transform",
        "cfg": "settings",
        "device": "device",
    }

    def __init__(self, model_dir: str, *args: Any, **kwargs: Any):
        """Load the stage of a model folder.

        Args:
            model_dir: the folder.
            **kwargs: ``device`` as ModelScope names it, and settings that take precedence over the file's.
        """
        super().__init__(model_dir, *args, **kwargs)
        names = SETTINGS_OF_STAGE[self.stage_class.name].names()
        settings = {name: kwargs[name] for name in names if name in kwargs}
        device = create_device(kwargs.get("device") or "gpu")
        self.stage = self.stage_class.load(model_dir, device, **settings)

    def __getattr__(self, name: str) -> Any:
        if name in self.stage_attributes:
            return getattr(self.stage, self.stage_attributes[name])
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.stage_attributes:
            setattr(self.stage, self.stage_attributes[name], value)
        else:
            super().__setattr__(name, value)


@register_class(MODELS, IMAGE_TO_VIDEO, *MODEL_NAMES)
class ImageToVideoModel(StageModel):
    """Stage one: a video whose content is an image's."""

    stage_class = ImageToVideo
    stage: ImageToVideo

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Generate a video for each image.

        Args:
            inputs: ``vit_frame`` [B, 3, 224, 224]; optional: ``request`` (else the settings' own) and
                ``noise``, the initial latent [B, 4, F, h, w], instead of the seed's.

        Returns:
            [B, 3, F, H, W] in about [-1, 1], float32 on the CPU.
        """
        request = inputs.get("request") or self.stage.resolve({})[0]
        latents = self.stage.sample(_tensor(inputs, "vit_frame"), request, noise=inputs.get("noise"))
        return self.stage.decode(latents, request)


@register_class(MODELS, VIDEO_TO_VIDEO, *MODEL_NAMES)
class VideoToVideoModel(StageModel):
    """Stage two: a larger, sharper video of a video's content.

    Attributes:
        negative_y: the negative prompt's embedding [1, 77, width].
        positive_prompt: put behind every text; the same as ``cfg.positive_prompt``.
    """

    stage_class = VideoToVideo
    stage: VideoToVideo
    stage_attributes = {
        **StageModel.stage_attributes, "negative_y": "negative_y", "positive_prompt": "positive_prompt",
    }  # fmt: skip

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Generate a sharper video of a video.

        Args:
            inputs: ``video_data`` [F, 3, H, W] in [-1, 1], of any size; optional: ``y`` [1, 77, width], the
                prompt's embedding (else the request's prompt is embedded), ``request`` (else the settings'
                own, with the inputs' ``text`` and the like), and instead of the seed's draws
                ``posterior_noise`` [F, 4, h, w], ``noise`` [1, 4, F, h, w] and ``entropy``, the Brownian
                tree's seed.

        Returns:
            [1, 3, F, H', W'] in about [-1, 1], float32 on the CPU.
        """
        prompts = {name: inputs[name] for name in PROMPT_KEYS if name in inputs}
        request = inputs.get("request") or self.stage.resolve(prompts)[0]
        frames = _tensor(inputs, "video_data")
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise InvalidInputError(f"video_data: must be [F, 3, H, W], got {list(frames.shape)}")
        given = {name: inputs.get(name) for name in ("y", "posterior_noise", "noise", "entropy")}
        return self.stage.decode(self.stage.sample(frames, request, **given), request)


def _tensor(inputs: Mapping[str, Any], name: str) -> Tensor:
    if not isinstance(inputs.get(name), Tensor):
        raise InvalidInputError(f"{name}: a tensor is needed, got {type(inputs.get(name)).__name__}")
    return inputs[name]
