"""The settings of a stage: read from a model folder's ``configuration.json``, typed and checked.

Every setting has its reference value as default. The same rules check a value in the file, one given as a
keyword, and one assigned later (``pipe.model.cfg.max_frames = 100``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Mapping

from ..errors import ConfigurationError, MissingFileError
from ..models.attention import ATTENTION_CHOICES
from ..models.autoencoder import AutoencoderConfig
from ..models.clip import LAYER_CHOICES, ClipConfig
from ..models.unet import UNetConfig
from .rules import (
    Rule,
    boolean,
    boolean_or,
    choice,
    did_you_mean,
    integer,
    interval,
    list_of,
    mapping,
    number,
    optional,
    size,
    text,
)

logger = logging.getLogger(__name__)

FILE_NAME = "configuration.json"

#: In a folder that holds both stages, the section of the file that describes the second.
SECOND_STAGE_SECTION = "video_to_video"

PRECISION_CHOICES = ("auto", "fp32", "fp16", "bf16")
SOLVER_MODE_CHOICES = ("fast", "normal")
SOLVER_CHOICES = ("ddim", "dpmpp")

DEFAULT_POSITIVE_PROMPT = (
    ", cinematic, High Contrast, highly detailed, unreal engine, taken using a Canon EOS R camera, "
    "hyper detailed photo - realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous "
    "detailing, skin pore detailing, hyper sharpness, perfect without deformations, "
    "Unreal Engine 5, 4k render"
)
DEFAULT_NEGATIVE_PROMPT = (
    "worst quality, normal quality, low quality, low res, blurry, text, watermark, logo, banner, "
    "extra digits, cropped, jpeg artifacts, signature, username, error, sketch ,duplicate, ugly, "
    "monochrome, horror, geometry, mutation, disgusting"
)

#: What each setting may be. Names are those of ``configuration.json`` and of the keywords.
RULES: dict[str, Rule] = {
    "ckpt_clip": text(non_empty=True),
    "ckpt_unet": text(non_empty=True),
    "ckpt_autoencoder": text(non_empty=True),
    "seed": optional(integer(0, 2**63 - 1)),
    "steps": optional(integer(1, 1000)),
    "batch_size": integer(1, 1024),
    "target_fps": integer(1, 240),
    "max_frames": integer(1, 100_000),
    "latent_hei": integer(1, 1024),
    "latent_wid": integer(1, 1024),
    "resolution": optional(size(8, 8192)),
    "guide_scale": number(0, 100),
    "guide_rescale": number(0, 1),
    "noise_strength": number(0, 10),
    "total_noise_levels": integer(1, 999),
    "solver_mode": choice(*SOLVER_MODE_CHOICES),
    "solver": choice(*SOLVER_CHOICES),
    "guidance_interval": optional(interval(0, 999)),
    "reuse_interval": integer(1, 100),
    "positive_prompt": text(),
    "negative_prompt": text(),
    "decoder_bs": integer(1, 4096),
    "precision": choice(*PRECISION_CHOICES),
    "attention": choice(*ATTENTION_CHOICES),
    "low_memory": boolean_or("auto"),
    "compile": boolean(),
    "limit_pixels": integer(64, 8192 * 8192),
    "limit_frames": integer(1, 100_000),
    "limit_steps": integer(1, 1000),
}

_POSITIVE = integer(1, 65_536)
_UNET_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "in_dim", "dim", "y_dim", "context_dim", "out_dim", "num_heads", "head_dim", "num_res_blocks",
            "num_tokens", "default_fps", "num_groups",
        ),
        _POSITIVE,
    ),
    "dim_mult": list_of(_POSITIVE),
    "attn_scales": list_of(number(0, 1)),
}  # fmt: skip
_AUTOENCODER_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("in_channels", "out_ch", "ch", "num_res_blocks", "z_channels", "embed_dim", "num_groups"), _POSITIVE
    ),
    "ch_mult": list_of(_POSITIVE),
}
_EMBEDDER_RULES: dict[str, Rule] = {
    "arch": text(non_empty=True),
    "model_cfg": optional(mapping()),
    "layer": choice(*LAYER_CHOICES),
}

#: Settings of the published code's training and class look-up: known, without effect on what is computed.
_WITHOUT_EFFECT = {
    "UNet": {
        "type", "input_dim", "dropout", "temporal_attention", "temporal_attn_times", "use_checkpoint",
        "use_fps_condition", "use_sim_mask",
    },
    "auto_encoder": {"type", "pretrained", "double_z", "resolution", "dropout"},
    "embedder": {"type", "pretrained", "vit_resolution"},
}  # fmt: skip


@dataclass
class StageSettings:
    """The settings that both stages have. Assigning one checks it; one object belongs to one model."""

    stage: ClassVar[str]

    ckpt_unet: str = ""
    ckpt_clip: str = "open_clip_pytorch_model.bin"
    ckpt_autoencoder: str = "v2-1_512-ema-pruned.ckpt"
    seed: int | None = None
    steps: int | None = None
    batch_size: int = 1
    target_fps: int = 8
    max_frames: int = 32
    latent_hei: int = 32
    latent_wid: int = 56
    resolution: tuple[int, int] | None = None
    guide_scale: float = 3.0
    decoder_bs: int = 8
    precision: str = "auto"
    attention: str = "auto"
    low_memory: bool | str = "auto"
    compile: bool = False
    # Approximations: by default there are none.
    guidance_interval: tuple[int, int] | None = None
    reuse_interval: int = 1
    # What a call may ask for at most, so that a slip of a digit is an error and not a full memory.
    limit_pixels: int = 4096 * 2304
    limit_frames: int = 1024
    limit_steps: int = 1000
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)

    def __setattr__(self, name: str, value: Any) -> None:
        names = [each.name for each in dataclasses.fields(self)]
        if name not in names:
            raise ConfigurationError(f"{self.stage} has no setting {name!r}{did_you_mean(name, names)}")
        rule = RULES.get(name)
        super().__setattr__(name, value if rule is None else rule.check(name, value, ConfigurationError))

    @classmethod
    def names(cls) -> list[str]:
        """Names of the settings that a file or a keyword may give, architectures left out."""
        return [each.name for each in dataclasses.fields(cls) if each.name in RULES]

    @property
    def frame_size(self) -> tuple[int, int]:
        """(width, height) of the video in pixels: ``resolution``, or what the latent's size comes to."""
        scale = self.autoencoder.downscale
        return self.resolution or (self.latent_wid * scale, self.latent_hei * scale)


@dataclass
class ImageToVideoSettings(StageSettings):
    """The settings of stage one."""

    stage: ClassVar[str] = "image-to-video"

    ckpt_unet: str = "base_03_alldata_fps_v_80g_0789000.pth"
    noise_strength: float = 0.1
    solver: str = "ddim"


@dataclass
class VideoToVideoSettings(StageSettings):
    """The settings of stage two."""

    stage: ClassVar[str] = "video-to-video"

    ckpt_unet: str = "non_ema_0035000.pth"
    latent_hei: int = 90
    latent_wid: int = 160
    guide_scale: float = 7.5
    guide_rescale: float = 0.2
    total_noise_levels: int = 600
    solver_mode: str = "fast"
    positive_prompt: str = DEFAULT_POSITIVE_PROMPT
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    decoder_bs: int = 2
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(image_conditioned=False, row_padding=2))


SETTINGS_OF_STAGE: dict[str, type[StageSettings]] = {
    settings.stage: settings for settings in (ImageToVideoSettings, VideoToVideoSettings)
}


def read_configuration(folder: str | Path) -> dict[str, Any]:
    """The contents of a model folder's ``configuration.json``.

    Raises:
        MissingFileError: if the folder or the file is not there.
        ConfigurationError: if it is not JSON, or not an object.
    """
    path = Path(folder) / FILE_NAME
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "there is no such file" if Path(folder).is_dir() else "there is no such folder"
        raise MissingFileError(
            f"{path}: {what}; a model folder holds a {FILE_NAME} beside its weights"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg} "
            "(JSON has no comments and no comma after the last entry)"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise ConfigurationError(f"{path}: is no configuration: {error}") from error
    if not isinstance(contents, dict):
        raise ConfigurationError(f"{path}: an object is needed, got {type(contents).__name__}")
    return contents


def stages_in(contents: Mapping[str, Any]) -> list[str]:
    """The stages that a ``configuration.json`` describes."""
    stages = [stage for stage in SETTINGS_OF_STAGE if stage == contents.get("task")]
    if SECOND_STAGE_SECTION in contents:
        stages.append(VideoToVideoSettings.stage)
    return list(dict.fromkeys(stages))


def section_of(contents: Mapping[str, Any], stage: str) -> str:
    """Where a ``configuration.json`` describes a stage."""
    return "model" if contents.get("task") == stage else SECOND_STAGE_SECTION


def load_settings(
    folder: str | Path, stage: str, overrides: Mapping[str, Any] | None = None
) -> StageSettings:
    """The settings of one stage: the file's, over the reference values, under the keywords'.

    Args:
        folder: the model folder.
        stage: ``image-to-video`` or ``video-to-video``.
        overrides: settings by name that go before the file's.

    Raises:
        MissingFileError, ConfigurationError: naming the file, the setting, the value and what is allowed.
    """
    path = Path(folder) / FILE_NAME
    contents = read_configuration(folder)
    if stage not in stages_in(contents):
        described = " and ".join(stages_in(contents)) or repr(contents.get("task"))
        raise ConfigurationError(f"{path}: describes {described}, not {stage}")
    section = section_of(contents, stage)
    try:
        settings = _parse(_merged(_object(contents, section), section), SETTINGS_OF_STAGE[stage], path)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    for name, value in (overrides or {}).items():
        setattr(settings, name, value)
    return settings


def _object(parent: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = parent.get(name, {})
    if not isinstance(value, dict):
        raise ConfigurationError(f"{name}: an object is needed, got {value!r}")
    return value


def _merged(model: dict[str, Any], section: str) -> dict[str, Any]:
    """One flat object from ``model_args`` and ``model_cfg``, in either of which a setting may stand."""
    given: dict[str, Any] = {}
    for part in ("model_args", "model_cfg"):
        for name, value in _object(model, part).items():
            name = "seed" if name == "Seed" else name
            if name in given and given[name] != value:
                raise ConfigurationError(
                    f"{section}: {name} is given twice, as {given[name]!r} and as {value!r}"
                )
            given[name] = value
    if "resolution" in given and {"latent_wid", "latent_hei"} & given.keys():
        logger.info("resolution %s goes before latent_wid and latent_hei", given["resolution"])
    return given


def _parse(given: dict[str, Any], settings_type: type[StageSettings], path: Path) -> StageSettings:
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name == "UNet":
            values["unet"] = dataclasses.replace(
                settings_type().unet, **_section(name, value, _UNET_RULES, path)
            )
        elif name == "auto_encoder":
            values["autoencoder"] = AutoencoderConfig(**_autoencoder_section(value, path))
        elif name == "embedder":
            values["clip"] = ClipConfig(**_section(name, value, _EMBEDDER_RULES, path))
        elif name in settings_type.names():
            values[name] = value
        else:
            known = [*settings_type.names(), "UNet", "auto_encoder", "embedder"]
            logger.warning("%s: unknown setting %r is ignored%s", path, name, did_you_mean(name, known))
    settings = settings_type(**values)
    _check_parts_fit(settings)
    return settings


def _check_parts_fit(settings: StageSettings) -> None:
    """What the parts hand to each other must be of one size."""
    unet, clip = settings.unet, settings.clip
    embedding = clip.embed_dim if unet.image_conditioned else clip.text_width
    pairs = (
        ("UNet: y_dim", unet.y_dim, "the width of the embedder's output", embedding),
        ("UNet: in_dim", unet.in_dim, "auto_encoder: embed_dim", settings.autoencoder.embed_dim),
        ("UNet: out_dim", unet.out_dim, "UNet: in_dim", unet.in_dim),
    )
    for name, value, other, needed in pairs:
        if value != needed:
            raise ConfigurationError(f"{name}: got {value}, allowed is {needed}, as {other} is")


def _section(name: str, value: Any, rules: dict[str, Rule], path: Path) -> dict[str, Any]:
    """The checked entries of an architecture's section."""
    if not isinstance(value, dict):
        raise ConfigurationError(f"{name}: an object is needed, got {value!r}")
    checked = {}
    for key, entry in value.items():
        if key in rules:
            checked[key] = rules[key].check(f"{name}: {key}", entry, ConfigurationError)
        elif key not in _WITHOUT_EFFECT[name]:
            logger.warning(
                "%s: %s: unknown setting %r is ignored%s", path, name, key, did_you_mean(key, rules)
            )
    return checked


def _autoencoder_section(value: Any, path: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        try:
            value = {**_object(value, "ddconfig"), **{k: v for k, v in value.items() if k != "ddconfig"}}
        except ConfigurationError as error:
            raise ConfigurationError(f"auto_encoder: {error}") from error
        if value.pop("attn_resolutions", []):
            raise ConfigurationError("auto_encoder: attn_resolutions: only [] is supported")
    return _section("auto_encoder", value, _AUTOENCODER_RULES, path)
