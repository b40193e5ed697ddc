"""The request of one generation: a call's keywords over the model's settings."""

from __future__ import annotations

import dataclasses
import json
import secrets
from dataclasses import dataclass
from typing import Any, Mapping

from ..errors import InvalidInputError
from .keywords import check_keywords
from .rules import choice, unique_keys
from .stages import SETTINGS_OF_STAGE, Setting, StageSettings, call_settings

#: Steps by solver, of stage two or of stage one.
_REFERENCE_STEPS = {"fast": 30, "normal": 50, "ddim": 50, "dpmpp": 25}


def computed_settings(stage: str) -> dict[str, Setting]:
    """Return the declarations of a stage's request, by its fields."""
    return {each.request_field: each for each in call_settings(stage).values() if each.request_field}


@dataclass(frozen=True)
class Request:
    """What one generation computes, and nothing else: its callback and progress travel beside it.

    ``size`` is (width, height) in pixels; ``window`` and ``overlap`` are in frames. The fields are those that
    the settings' declarations name, in the order in which they are recorded; what a stage has not is left at
    its default. ``size`` is not yet the video's where there is a ``scale``: see ``scaled``.
    """

    stage: str
    seed: int
    steps: int
    guide_scale: float
    size: tuple[int, int]
    fps: int | str
    frames: int
    window: int
    overlap: int
    guidance_interval: tuple[int, int] | None = None
    reuse_interval: int = 1
    noise_strength: float = 0.0
    solver: str = ""
    text: str = ""
    positive_prompt: str = ""
    negative_prompt: str = ""
    total_noise_levels: int = 0
    solver_mode: str = ""
    guide_rescale: float = 0.0
    lora: tuple[str, ...] = ()
    lora_scale: tuple[float, ...] = ()
    scale: float | None = None
    scene_cuts: bool = False
    tile_size: int | None = None
    tile_overlap: int | None = None
    colour: str = "model"
    keep_audio: bool = False
    codec: str = "h264"
    crf: int | None = None
    pix_fmt: str | None = None

    def __post_init__(self) -> None:
        if self.overlap >= self.window:
            raise InvalidInputError(
                f"overlap_size: got {self.overlap}, allowed is less than the {self.window} frames of a chunk"
            )
        if self.tile_size is not None and (self.tile_overlap or 0) >= self.tile_size:
            raise InvalidInputError(
                f"tile_overlap: got {self.tile_overlap}, allowed is less than the {self.tile_size} pixels of "
                "a tile"
            )

    @classmethod
    def resolve(cls, settings: StageSettings, keywords: Mapping[str, Any] | None = None) -> Request:
        """Return the request that ``keywords`` (checked by ``check_keywords``) make of a model's settings.

        Raises:
            InvalidInputError: if its windows cannot be laid out.
        """
        keywords = keywords or {}
        if {"scale", "resolution"} <= keywords.keys():
            raise InvalidInputError("scale and resolution both say how large the video is: give one of them")
        values = {
            field: keywords.get(each.name, getattr(settings, each.name, None))
            for field, each in computed_settings(settings.stage).items()
        }
        values["seed"] = _seed(values["seed"], keywords)
        values["steps"] = values["steps"] or _REFERENCE_STEPS[values.get("solver_mode") or values["solver"]]
        values["size"] = values["size"] or settings.frame_size
        if "resolution" in keywords:
            values["scale"] = None
        values["window"] = values["window"] or values["frames"]
        if values["overlap"] is None:
            values["overlap"] = values["window"] // 4
        values["lora"], values["lora_scale"] = with_scales(values["lora"], values["lora_scale"])
        return cls(settings.stage, **{field: each for field, each in values.items() if each is not None})

    def keywords(self) -> dict[str, Any]:
        """Return the call keywords that make this very request, whatever the settings.

        What is declared as quiet is among them where it is not the reference value.
        """
        declared = computed_settings(self.stage)
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in declared
            and not (declared[field.name].quiet and getattr(self, field.name) == field.default)
        }
        if self.scale is not None:  # the size is then still to be known
            del values["size"]
        return {declared[name].keyword: value for name, value in values.items()}

    def scaled(self, source: tuple[int, int]) -> Request:
        """Return this request with ``scale`` as a size, that of a source of (width, height) times it.

        Sides are even, as video files want them.
        """
        if self.scale is None:
            return self
        width, height = (max(2 * round(self.scale * side / 2), 8) for side in source)
        return dataclasses.replace(self, size=(width, height), scale=None)

    def to_json(self) -> str:
        """Return the stage and the keywords as a JSON object."""
        return json.dumps({"stage": self.stage, **self.keywords()})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Return the request that ``to_json`` wrote; what is missing has its reference value.

        Raises:
            InvalidInputError: if it is no JSON object, or a keyword is repeated, unknown or not allowed.
        """
        try:
            keywords = dict(json.loads(text, object_pairs_hook=unique_keys))
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidInputError(f"request: is not a JSON object: {error}") from error
        stage = choice(*SETTINGS_OF_STAGE).check("stage", keywords.pop("stage", None), InvalidInputError)
        return cls.resolve(SETTINGS_OF_STAGE[stage](), check_keywords(stage, keywords))

    @property
    def prompt(self) -> str:
        """The whole text of the conditional branch."""
        return self.text + self.positive_prompt

    @property
    def mode(self) -> str:
        """``exact``, or ``approximate`` and what departs from the published computation."""
        asked = []
        if self.solver == "dpmpp":
            asked.append("solver dpmpp")
        if self.guidance_interval is not None:
            asked.append("guidance_interval {}-{}".format(*self.guidance_interval))
        if self.reuse_interval > 1:
            asked.append(f"reuse_interval {self.reuse_interval}")
        return f"approximate: {', '.join(asked)}" if asked else "exact"


def with_scales(lora: Any, scale: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the adapters of ``lora`` and as many scales, each of the two one or several.

    Raises:
        InvalidInputError: if there are neither one scale nor as many as adapters.
    """
    paths = (lora,) if isinstance(lora, str) else tuple(lora or ())
    scales = scale if isinstance(scale, tuple) else (scale,)
    if len(scales) == 1:
        scales *= len(paths)
    if paths and len(scales) != len(paths):
        raise InvalidInputError(
            f"lora_scale: got {len(scales)} numbers for {len(paths)} adapters, allowed is one, or as many"
        )
    return paths, scales[: len(paths)]


def _seed(seed: int | None, keywords: Mapping[str, Any]) -> int:
    generator = keywords.get("generator")
    if generator is not None and "seed" not in keywords:
        import torch  # there already, as its generator is

        # A seed of its own, so that the seed that is reported reproduces this very video.
        return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
    return secrets.randbelow(2**32) if seed is None else seed
