"""One generation's request: what the settings say, under what the pipeline's and the call's keywords say.

Pipelines and the command line make their requests here, so that they cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any, Callable, Mapping

import torch
from torch import Tensor

from ..engine.memory.estimate import memory_in_words
from ..errors import InvalidInputError
from .configuration import RULES, StageSettings, VideoToVideoSettings
from .rules import Rule, boolean, did_you_mean, function, integer, optional, text

#: Called after each step with (step, timestep or noise level, latents [B, 4, F, h, w]).
StepCallback = Callable[[int, float, Tensor], None]


def _generator_rule() -> Rule:
    def convert(value: Any) -> torch.Generator:
        if not isinstance(value, torch.Generator):
            raise TypeError
        return value

    return Rule("a torch.Generator", convert)


#: What a call may give, by keyword or, for what concerns the video's content, in its input dict.
KEYWORD_RULES: dict[str, Rule] = {
    **{
        name: optional(RULES[name])
        for name in (
            "seed", "steps", "guide_scale", "guide_rescale", "noise_strength", "total_noise_levels",
            "solver_mode", "solver", "guidance_interval", "reuse_interval", "positive_prompt",
            "negative_prompt", "max_frames", "resolution", "target_fps",
        )
    },
    "fps": optional(RULES["target_fps"]),
    "text": optional(text()),
    "chunk_size": optional(integer(2, 100_000)),
    "overlap_size": optional(integer(0, 100_000)),
    "generator": optional(_generator_rule()),
    "callback": optional(function()),
    "progress": optional(boolean()),
}  # fmt: skip

#: By solver, of stage two or of stage one.
_REFERENCE_STEPS = {"fast": 30, "normal": 50, "ddim": 50, "dpmpp": 25}

#: Keywords that only one of the stages knows.
_STAGE_TWO_ONLY = {
    "text", "positive_prompt", "negative_prompt", "total_noise_levels", "guide_rescale", "solver_mode",
}  # fmt: skip
_STAGE_ONE_ONLY = {"noise_strength", "solver"}


def keywords_of(stage: str) -> list[str]:
    """The keywords that a call of a stage's pipeline takes, beside ``output_video`` and ``batch_size``."""
    other = _STAGE_ONE_ONLY if stage == VideoToVideoSettings.stage else _STAGE_TWO_ONLY
    return sorted(KEYWORD_RULES.keys() - other)


def check_keywords(stage: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that were given (None counts as not given), each in its proper type.

    Raises:
        InvalidInputError: for an unknown keyword or a value that is not allowed, naming what is.
    """
    known = keywords_of(stage)
    checked = {}
    for name, value in keywords.items():
        if name not in known:
            known = ["output_video", "batch_size", *known]
            raise InvalidInputError(f"{stage} has no keyword {name!r}{did_you_mean(name, known)}")
        value = KEYWORD_RULES[name].check(name, value, InvalidInputError)
        if value is not None:
            checked["target_fps" if name == "fps" else name] = value
    return checked


@dataclass(frozen=True)
class Request:
    """What one generation computes. ``size`` is (width, height) in pixels, ``window`` in frames."""

    stage: str
    seed: int
    steps: int
    guide_scale: float
    size: tuple[int, int]
    fps: int
    frames: int
    window: int
    overlap: int
    guide_rescale: float = 0.0
    noise_strength: float = 0.0
    total_noise_levels: int = 0
    solver_mode: str = ""
    solver: str = ""
    guidance_interval: tuple[int, int] | None = None
    reuse_interval: int = 1
    text: str = ""
    positive_prompt: str = ""
    negative_prompt: str = ""
    callback: StepCallback | None = dataclasses.field(default=None, compare=False)
    progress: bool | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def resolve(cls, settings: StageSettings, keywords: Mapping[str, Any] | None = None) -> Request:
        """The request that ``keywords`` (checked by ``check_keywords``) make of a model's settings.

        Raises:
            InvalidInputError: if it goes beyond the settings' limits, or its windows cannot be laid out.
        """
        keywords = dict(keywords or {})
        generator = keywords.pop("generator", None)
        if generator is not None and "seed" not in keywords:
            # A seed of its own, so that the seed that is reported reproduces this very video.
            draw = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device)
            keywords["seed"] = int(draw)

        def value(name: str, default: Any = None) -> Any:
            return keywords.get(name, getattr(settings, name, default))

        seed = value("seed")
        steps = value("steps") or _REFERENCE_STEPS[value("solver_mode") or value("solver")]
        window = keywords.get("chunk_size", value("max_frames"))
        overlap = keywords.get("overlap_size", window // 4)
        if overlap >= window:
            raise InvalidInputError(
                f"overlap_size: got {overlap}, allowed is less than the {window} frames of a chunk"
            )
        request = cls(
            stage=settings.stage,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            steps=steps,
            guide_scale=value("guide_scale"),
            size=keywords.get("resolution", settings.frame_size),
            fps=value("target_fps"),
            frames=value("max_frames"),
            window=window,
            overlap=overlap,
            guide_rescale=value("guide_rescale", 0.0),
            noise_strength=value("noise_strength", 0.0),
            total_noise_levels=value("total_noise_levels", 0),
            solver_mode=value("solver_mode", ""),
            solver=value("solver", ""),
            guidance_interval=value("guidance_interval"),
            reuse_interval=value("reuse_interval"),
            text=value("text", ""),
            positive_prompt=value("positive_prompt", ""),
            negative_prompt=value("negative_prompt", ""),
            callback=keywords.get("callback"),
            progress=keywords.get("progress"),
        )
        request.check_limits(settings)
        return request

    def check_limits(self, settings: StageSettings, frames: int | None = None) -> None:
        """Refuse what goes beyond ``limit_pixels``, ``limit_frames`` or ``limit_steps``.

        Args:
            settings: the model's.
            frames: of the video that stage two is given. Its ``max_frames`` is no number of frames to
                generate, so without this it is left out.

        Raises:
            InvalidInputError: with what was asked for, the limit, how to raise it, and the memory needed.
        """
        frames_words = f"video: has {frames or 0:,} frames or more"
        if self.stage != VideoToVideoSettings.stage:
            frames, frames_words = self.frames, f"max_frames: got {self.frames:,}"
        width, height = self.size
        for limit, got, words in (
            ("limit_pixels", width * height, f"resolution: got {width}x{height}, {width * height:,} pixels"),
            ("limit_frames", frames or 0, frames_words),
            ("limit_steps", self.steps, f"steps: got {self.steps:,}"),
        ):
            allowed = getattr(settings, limit)
            if got > allowed:
                needed = memory_in_words(
                    settings, self.size, frames or min(self.window, settings.limit_frames), self.window
                )
                raise InvalidInputError(
                    f"{words}; {limit} allows {allowed:,}. {needed}. If that is meant, raise {limit}: in "
                    f"configuration.json, as a keyword of pipeline(), or as pipe.model.cfg.{limit}"
                )

    @property
    def prompt(self) -> str:
        """The whole text of the conditional branch."""
        return self.text + self.positive_prompt

    @property
    def approximations(self) -> list[str]:
        """What makes the result another than the published computation's, in words; mostly nothing."""
        asked = []
        if self.solver == "dpmpp":
            asked.append("solver dpmpp")
        if self.guidance_interval is not None:
            asked.append("guidance_interval {}-{}".format(*self.guidance_interval))
        if self.reuse_interval > 1:
            asked.append(f"reuse_interval {self.reuse_interval}")
        return asked

    @property
    def mode(self) -> str:
        """``exact``, or ``approximate`` and in which way."""
        return f"approximate: {', '.join(self.approximations)}" if self.approximations else "exact"
