"""A model folder's ``configuration.json``, read into one typed and checked object.

The same rules check a value in the file, one given as a keyword, and one assigned later
(``pipe.model.cfg.max_frames = 100``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import stat
from pathlib import Path
from typing import Any, Mapping

from ..errors import ConfigurationError, MissingFileError, describe
from ..models.config import LAYER_CHOICES, AutoencoderConfig, ClipConfig
from .rules import (
    Rule,
    choice,
    did_you_mean,
    integer,
    list_of,
    number,
    optional,
    text,
    unique_keys,
)
from .stages import SETTINGS_OF_STAGE, VIDEO_TO_VIDEO, StageSettings

logger = logging.getLogger(__name__)

FILE_NAME = "configuration.json"
_MOST_BYTES = 2**20

#: In a folder that holds both stages, the section of the file that describes the second.
SECOND_STAGE_SECTION = "video_to_video"

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
    "model_cfg": optional(Rule("object")),
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


def read_configuration(folder: str | Path) -> dict[str, Any]:
    """Return the contents of a model folder's ``configuration.json``.

    Raises:
        MissingFileError: if the folder or the file is not there.
        ConfigurationError: if it is not JSON, not an object, has a key twice, or is no file of sensible size.
    """
    path = Path(folder) / FILE_NAME
    try:
        contents = json.loads(_read_text(path), object_pairs_hook=unique_keys)
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


def _read_text(path: Path) -> str:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would be waited for, a device has no end
        raise ValueError("it is not an ordinary file")
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES:,} bytes")
    return data.decode("utf-8-sig")


def stages_in(contents: Mapping[str, Any]) -> list[str]:
    """Return the stages that a ``configuration.json`` describes."""
    stages = [stage for stage in SETTINGS_OF_STAGE if stage == contents.get("task")]
    if SECOND_STAGE_SECTION in contents:
        stages.append(VIDEO_TO_VIDEO)
    return list(dict.fromkeys(stages))


def section_of(contents: Mapping[str, Any], stage: str) -> str:
    """Return the key of the section in which a ``configuration.json`` describes a stage."""
    return "model" if contents.get("task") == stage else SECOND_STAGE_SECTION


def load_settings(
    folder: str | Path, stage: str, overrides: Mapping[str, Any] | None = None
) -> StageSettings:
    """Return the settings of one stage: the file's, over the reference values, under the keywords'.

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
        raise ConfigurationError(f"{name}: an object is needed, got {describe(value)}")
    return value


def _merged(model: dict[str, Any], section: str) -> dict[str, Any]:
    """Return one flat object of ``model_args`` and ``model_cfg``, in either of which a setting may stand."""
    values: dict[str, Any] = {}
    for part in ("model_args", "model_cfg"):
        for name, value in _object(model, part).items():
            name = "seed" if name == "Seed" else name
            if name in values and values[name] != value:
                both = f"{describe(values[name])} and as {describe(value)}"
                raise ConfigurationError(f"{section}: {name} is given twice, as {both}")
            values[name] = value
    if "resolution" in values and {"latent_wid", "latent_hei"} & values.keys():
        logger.info("resolution %s goes before latent_wid and latent_hei", values["resolution"])
    return values


def _parse(entries: dict[str, Any], settings_type: type[StageSettings], path: Path) -> StageSettings:
    values: dict[str, Any] = {}
    for name, value in entries.items():
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
    """Refuse parts that hand each other what is not of one size."""
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
    """Return the checked entries of an architecture's section."""
    if not isinstance(value, dict):
        raise ConfigurationError(f"{name}: an object is needed, got {describe(value)}")
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
