"""``modelscope-i2v doctor``: what is installed, what would be chosen, and whether a model is complete."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, NamedTuple

from .. import __version__
from ..errors import I2VError
from .command import Command, echo

if TYPE_CHECKING:
    from ..settings.stages import StageSettings

#: The packages whose versions matter to a report, by the names that they are installed under.
_PACKAGES = (
    "modelscope",
    "torch",
    "open_clip_torch",
    "einops",
    "torchsde",
    "av",
    "Pillow",
    "numpy",
    "xformers",
)
#: Of them, what is used instead of an optional one.
_INSTEAD = {"xformers": "torch's own attention is used"}


class Finding(NamedTuple):
    """One line of a diagnosis. ``advice`` says what to do where something is wrong."""

    subject: str
    state: str
    advice: str = ""


def _packages() -> Iterator[Finding]:
    yield Finding("modelscope_i2v", f"{__version__}, Python {platform.python_version()}")
    for name in _PACKAGES:
        optional = f" (optional: {_INSTEAD[name]})" if name in _INSTEAD else ""
        try:
            yield Finding(name, importlib.metadata.version(name) + (" (optional)" if optional else ""))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, f"not installed{optional}", "" if optional else f"pip install {name}")


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
    elif status["error"]:
        yield Finding("plugin", f"not active: {status['error']}", "report this, with the error")
    else:
        again = "pip install --force-reinstall modelscope_i2v"
        yield Finding("plugin", f"not active: {status['state']}", again)
    by_import = "import modelscope_i2v activates"
    yield {
        "on": Finding("start-up hook", "on: no import of modelscope_i2v is needed"),
        "off": Finding("start-up hook", f"off by {AUTOLOAD_VARIABLE}=0: {by_import}"),
        "not installed": Finding(
            "start-up hook", f"not installed: {by_import}", "pip install modelscope_i2v"
        ),
    }[str(status["start_up_hook"])]


def _device() -> Iterator[Finding]:
    import torch

    from ..engine.memory.estimate import choose_low_memory
    from ..engine.precision import select_dtype
    from ..models.attention import select_attention
    from ..settings.stages import SETTINGS_OF_STAGE
    from ..weights.loading import precision_name

    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        what = f"{torch.cuda.get_device_name(device)}, {free:.1f} of {total:.1f} GiB free"
    else:
        device = torch.device("cpu")
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA GPU"
        what = f"{os.cpu_count()} cores, as {why}"
    yield Finding("device", f"{device}: {what}")
    precision = precision_name(select_dtype("auto", device))
    yield Finding("precision", f"{precision}, as 'auto' chooses on {device.type}")
    attention = select_attention("auto", device).__name__
    yield Finding("attention", f"{attention}, as 'auto' chooses: torch's own")
    if device.type != "cuda":
        yield Finding("memory", "all networks stay in the host's memory")
        return
    for stage, settings in SETTINGS_OF_STAGE.items():
        turns = "one network at a time" if choose_low_memory(settings(), device) else "all networks"
        yield Finding("memory", f"{stage}: {turns} on the device, as low_memory 'auto' chooses")


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
        (width, height), seed = settings.frame_size, settings.seed
        yield Finding(stage, f"{width}x{height}, seed {'random' if seed is None else seed}")
        yield from _weights(folder, settings)


def _weights(folder: Path, settings: StageSettings) -> Iterator[Finding]:
    from ..weights import check_weights
    from ..weights.parts import stage_parts

    try:
        parts = stage_parts(settings, folder)
    except I2VError as error:
        yield Finding(settings.stage, str(error), "download what is missing")
        return
    for name, part in parts.items():
        subject, size = f"{settings.stage}: {part.path.name}", f"{part.path.stat().st_size / 1e9:.2f} GB"
        try:
            check_weights(part.weights, part.path, part.prefix, ignore=part.ignored)
        except I2VError as error:
            yield Finding(subject, f"{size}: {error}", "download it again")
        else:
            yield Finding(subject, f"{size}, with all {len(part.weights.state_dict())} weights of the {name}")


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="DIR", help="a model folder to look through, too")


def _doctor(arguments: argparse.Namespace) -> None:
    findings = [*_packages(), *_plugin(), *_device()]
    if arguments.folder is not None:
        findings += _model_folder(Path(arguments.folder).expanduser())
    width = max(len(finding.subject) for finding in findings)
    for subject, state, advice in findings:
        echo(f"{'!' if advice else ' '} {subject:<{width}}  {state}")
        if advice:
            echo(f"  {'':<{width}}  -> {advice}")
    problems = sum(bool(finding.advice) for finding in findings)
    if problems:
        raise I2VError(f"{problems} problem{'s' if problems > 1 else ''} found")


DOCTOR = Command(
    "doctor",
    "say what is installed, which device, precision and attention would be chosen, and what is wrong",
    _add_doctor_arguments,
    _doctor,
)
