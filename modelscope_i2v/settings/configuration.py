"""A model folder's ``configuration.json``, read into one typed and checked object.

Settings check the values that they are assigned, architectures those that they are made of.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Mapping

from ..errors import ConfigurationError, MissingFileError, describe
from .rules import did_you_mean, unique_keys
from .stages import SETTINGS_OF_STAGE, VIDEO_TO_VIDEO, StageSettings

logger = logging.getLogger(__name__)

FILE_NAME = "configuration.json"
_MOST_BYTES = 2**20

#: In a folder that holds both stages, the section of the file that describes the second.
SECOND_STAGE_SECTION = "video_to_video"

#: Sections of the architectures, by the settings that they become.
_ARCHITECTURES = {"UNet": "unet", "auto_encoder": "autoencoder", "embedder": "clip"}
#: Fields of an architecture that the stage decides, and no file.
_STAGES_OWN = ("image_conditioned", "row_padding")
#: Settings of the published code's training and class look-up: known, without effect on what is computed.
_WITHOUT_EFFECT = {
    "UNet": (
        "type", "input_dim", "dropout", "temporal_attention", "temporal_attn_times", "use_checkpoint",
        "use_fps_condition", "use_sim_mask",
    ),
    "auto_encoder": ("type", "pretrained", "double_z", "resolution", "dropout"),
    "embedder": ("type", "pretrained", "vit_resolution"),
}  # fmt: skip


def read_configuration(folder: str | Path) -> dict[str, Any]:
    """Return the contents of a model folder's ``configuration.json``.

    Raises:
        MissingFileError: if the folder or the file is not there.
        ConfigurationError: if it cannot be read, is no JSON object of sensible size, or has a key twice.
    """
    path = Path(folder) / FILE_NAME
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe, or a device without an end
            raise ValueError("it is not an ordinary file")
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES:,} bytes")
        contents = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
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
    """Return the settings of one stage: overrides go before the file, and that before reference values.

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
        settings = _parse(_merged(_object(contents, section), section), SETTINGS_OF_STAGE[stage](), path)
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
    return values


def _parse(entries: dict[str, Any], settings: StageSettings, path: Path) -> StageSettings:
    """Return the settings with a file's entries instead of the reference values."""
    for name, value in entries.items():
        if name in _ARCHITECTURES:
            default = getattr(settings, _ARCHITECTURES[name])
            changed = dataclasses.replace(default, **_section(name, value, default, path))
            setattr(settings, _ARCHITECTURES[name], changed)
        elif name in settings.names():
            setattr(settings, name, value)
        else:
            known = [*settings.names(), *_ARCHITECTURES]
            logger.warning("%s: unknown setting %r is ignored%s", path, name, did_you_mean(name, known))
    _check_parts_fit(settings)
    return settings


def _section(name: str, entries: Any, default: Any, path: Path) -> dict[str, Any]:
    """Return the entries of an architecture's section by the architecture's fields."""
    entries = _object({name: entries}, name)
    if name == "auto_encoder":
        entries = {**_object(entries, "ddconfig"), **entries}
        entries.pop("ddconfig", None)
        if entries.pop("attn_resolutions", []):
            raise ConfigurationError("auto_encoder: attn_resolutions: only [] is supported")
    known = {field.name for field in dataclasses.fields(default)}.difference(_STAGES_OWN)
    for key in [key for key in entries if key not in known and key not in _WITHOUT_EFFECT[name]]:
        logger.warning("%s: %s: unknown setting %r is ignored%s", path, name, key, did_you_mean(key, known))
    return {key: tuple(v) if isinstance(v, list) else v for key, v in entries.items() if key in known}


def _check_parts_fit(settings: StageSettings) -> None:
    """Refuse networks whose outputs and inputs are not of one size."""
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
