"""What is installed, what would be chosen, and whether a model folder is complete."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

from .. import __version__
from ..errors import I2VError

if TYPE_CHECKING:
    from ..settings.stages import StageSettings

#: The packages whose versions matter to a report, by the names that they are installed under.
_REQUIRED = ("modelscope", "torch", "open_clip_torch", "einops", "torchsde", "av", "Pillow", "numpy")
_OPTIONAL = ("xformers",)


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis. ``advice`` says what to do where something is wrong."""

    subject: str
    state: str
    advice: str = ""

    @property
    def is_problem(self) -> bool:
        return bool(self.advice)


def diagnose(folder: str | Path | None = None) -> list[Finding]:
    """All findings, on the installation and, if one is given, on a model folder."""
    findings = [*_packages(), *_plugin(), *_device()]
    if folder is not None:
        findings += _model_folder(Path(folder))
    return findings


def _packages() -> Iterator[Finding]:
    yield Finding("modelscope_i2v", f"{__version__}, Python {platform.python_version()}")
    for name in _REQUIRED:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed", f"pip install {name}")
    for name in _OPTIONAL:
        try:
            yield Finding(name, f"{importlib.metadata.version(name)} (optional)")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed (optional: torch's own attention is used)")


def _plugin() -> Iterator[Finding]:
    from ..plugin.activation import AUTOLOAD_VARIABLE, activation_status

    try:
        import modelscope.models.builder  # noqa: F401 - whose import is what activates
    except Exception as error:  # whatever is wrong with that installation
        yield Finding("ModelScope", f"cannot be imported: {error}", "pip install 'modelscope[framework]'")
        return
    status = activation_status()
    if status["state"] == "registered":
        yield Finding("plugin", "behind ModelScope's image-to-video and video-to-video tasks")
    else:
        advice = (
            "report this, with the error"
            if status["error"]
            else "pip install --force-reinstall modelscope_i2v"
        )
        yield Finding("plugin", f"not active: {status['error'] or status['state']}", advice)
    hook = status["start_up_hook"]
    if hook == "on":
        yield Finding("start-up hook", "on: no import of modelscope_i2v is needed")
    elif hook == "off":
        yield Finding("start-up hook", f"off by {AUTOLOAD_VARIABLE}=0: import modelscope_i2v activates")
    else:
        yield Finding(
            "start-up hook", "not installed: import modelscope_i2v activates", "pip install modelscope_i2v"
        )


def _device() -> Iterator[Finding]:
    import torch

    from ..engine.memory.estimate import choose_low_memory
    from ..engine.precision import select_dtype
    from ..models.attention import select_attention
    from ..settings.stages import ImageToVideoSettings, VideoToVideoSettings
    from ..weights.loading import precision_name

    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        name = torch.cuda.get_device_name(device)
        yield Finding("device", f"{device}: {name}, {free:.1f} of {total:.1f} GiB free")
    else:
        device = torch.device("cpu")
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA GPU"
        yield Finding("device", f"cpu, {os.cpu_count()} cores: {why}")
    dtype = select_dtype("auto", device)
    yield Finding("precision", f"{precision_name(dtype)}, as 'auto' chooses on {device.type}")
    attention = select_attention("auto", device)
    yield Finding("attention", f"{attention.__name__}, as 'auto' chooses: torch's own")
    if device.type != "cuda":
        yield Finding("memory", "all networks stay in the host's memory")
        return
    for settings in (ImageToVideoSettings(), VideoToVideoSettings()):
        turns = "one network at a time" if choose_low_memory(settings, device) else "all networks"
        yield Finding("memory", f"{settings.stage}: {turns} on the device, as low_memory 'auto' chooses")


def _model_folder(folder: Path) -> Iterator[Finding]:
    from ..settings.configuration import load_settings, read_configuration, stages_in

    try:
        stages = stages_in(read_configuration(folder))
    except I2VError as error:
        yield Finding(str(folder), str(error), "give a folder downloaded from the hub")
        return
    if not stages:
        yield Finding(str(folder), "describes no stage of this package's", 'check its "task"')
    for stage in stages:
        try:
            settings = load_settings(folder, stage)
        except I2VError as error:
            yield Finding(stage, str(error), "correct the file")
            continue
        width, height = settings.frame_size
        yield Finding(stage, f"{width}x{height}, seed {'random' if settings.seed is None else settings.seed}")
        yield from _weights(folder, stage, settings)


def _weights(folder: Path, stage: str, settings: StageSettings) -> Iterator[Finding]:
    from ..weights import check_weights
    from ..weights.parts import stage_parts

    try:
        parts = stage_parts(settings, folder)
    except I2VError as error:
        yield Finding(stage, str(error), "download what is missing")
        return
    for name, part in parts.items():
        size = f"{part.path.stat().st_size / 1e9:.2f} GB"
        subject = f"{stage}: {part.path.name}"
        try:
            check_weights(part.weights, part.path, part.prefix, ignore=part.ignored)
        except I2VError as error:
            yield Finding(subject, f"{size}: {error}", "download it again")
        else:
            keys = len(part.weights.state_dict())
            yield Finding(subject, f"{size}, with all {keys} weights of the {name}")
