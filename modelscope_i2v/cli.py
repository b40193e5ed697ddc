"""The command line, ``modelscope-i2v``: a table of commands, and what each of them does.

What is slow to import (torch, ModelScope) is imported by the commands that need it, when they run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, Sequence

from . import __version__
from .errors import ConfigurationError, I2VError, InvalidInputError, MissingFileError, MissingPackageError

PROGRAM = "modelscope-i2v"

#: The published models: their ids on ModelScope's hub, and the version that this package is for.
IMAGE_TO_VIDEO_MODEL = "damo/Image-to-Video"
VIDEO_TO_VIDEO_MODEL = "damo/Video-to-Video"
REVISION = "v1.1.0"

#: The user's to correct, as a wrong argument is; other errors of ours exit with 1.
_EXIT_WITH_2 = (InvalidInputError, ConfigurationError, MissingFileError, MissingPackageError)

_CHECKPOINTS = ("ckpt_clip", "ckpt_unet", "ckpt_autoencoder")

_ABOUT_THE_WEIGHTS = f"""\
Both stages work. What these videos show is noise, and that is as it should be: the demo's model is small, and
its weights are random numbers. The real weights come from ModelScope's hub:

  modelscope download --model {IMAGE_TO_VIDEO_MODEL} --revision {REVISION}
      open_clip_pytorch_model.bin 3.94 GB, v2-1_512-ema-pruned.ckpt 5.21 GB,
      base_03_alldata_fps_v_80g_0789000.pth 5.68 GB
  modelscope download --model {VIDEO_TO_VIDEO_MODEL} --revision {REVISION}
      the same two files, and non_ema_0035000.pth 5.65 GB

or by themselves, with the first of these calls or with this command:

  pipeline(task="image-to-video", model="{IMAGE_TO_VIDEO_MODEL}", model_revision="{REVISION}")
  pipeline(task="video-to-video", model="{VIDEO_TO_VIDEO_MODEL}", model_revision="{REVISION}")

  {PROGRAM} generate IMAGE -o video.mp4 --refine"""

# At once, also into a pipe: minutes may pass between two lines.
_say = functools.partial(print, flush=True)


@dataclass(frozen=True)
class Command:
    """One of the program's commands: its name, its help, its arguments and what it does."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments, instead of the process's own.

    Returns:
        The exit code: 0; 2 for what the user can correct (usage, input, settings, missing files); 1 for
        other failures; 130 when interrupted; 141 when nobody reads the output any more.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version and argparse's own errors
        return int(stop.code or 0)
    try:
        arguments.run(arguments)
        return 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141
    except Exception as error:
        if not (isinstance(error, (I2VError, MemoryError)) or _is_out_of_gpu_memory(error)):
            raise  # a bug: its traceback is what a report needs
        if arguments.debug:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {_words(error)}", file=sys.stderr)
        return 2 if isinstance(error, _EXIT_WITH_2) else 1


def _is_out_of_gpu_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here


def _words(error: Exception) -> str:
    """An error in one line, without the class that ModelScope puts before what it builds raises."""
    words = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    if not isinstance(error, I2VError):
        return f"out of memory; fewer --frames or a smaller --size take less ({words or 'no details'})"
    return re.sub(r"^(\w+(Pipeline|Model): )+", "", words)


# --- arguments ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="From an image to a video, with I2VGen-XL.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False
        )
        command.add_arguments(subparser)
        subparser.add_argument(
            "--debug", action="store_true", help="show all logs, and where an error comes from"
        )
        subparser.set_defaults(run=command.run)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What all commands take that run the stages."""
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same video")
    parser.add_argument("--device", metavar="D", help="cpu, gpu or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--progress", action="store_true", help="show progress bars, not only on a terminal")


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a path or a URL (default: a picture of ours)")
    add("-o", "--output", default=".", metavar="FOLDER", help="for the two videos (default: the current one)")
    add("--cache", metavar="DIR", help="where to keep the small model, instead of the user's cache folder")
    _add_run_arguments(parser)


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="a path or a URL")
    add("-o", "--output", required=True, metavar="PATH", help="the video to write: .mp4, .m4v or .mov")
    add("--model", default=IMAGE_TO_VIDEO_MODEL, metavar="DIR_OR_ID",
        help="stage one's folder, or its id on the hub (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="of denoising")
    add("--guide-scale", type=float, metavar="X", help="how closely to follow the image")
    add("--frames", type=int, metavar="N", help="the video's length")
    add("--size", type=_size, metavar="WxH", help="of the video, in pixels")
    add("--fps", type=int, metavar="N", help="frames per second")
    add("--precision", metavar="P", help="auto, fp32, fp16 or bf16")
    _add_run_arguments(parser)
    refine = parser.add_argument_group("stage two: a larger, sharper video")
    refine.add_argument("--refine", nargs="?", const="", metavar="DIR_OR_ID",
        help="run it too, of this folder or id on the hub (default: stage one's folder if it describes both "
        f"stages, else {VIDEO_TO_VIDEO_MODEL})")  # fmt: skip
    refine.add_argument("--text", metavar="T", help="what the video shows, in English")
    refine.add_argument("--refine-steps", type=int, metavar="N", help="of denoising in stage two")
    refine.add_argument("--refine-size", type=_size, metavar="WxH", help="of the final video, in pixels")
    refine.add_argument("--keep-first", metavar="PATH", help="write stage one's video there")


def _size(text: str) -> list[int]:
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is WIDTHxHEIGHT in pixels, as 448x256")
    return [int(side) for side in match.groups()]


# --- running a stage ---


@dataclass(frozen=True)
class _Stage:
    """A stage to run: the task, the model, what the pipeline is built with and what it is called with."""

    task: str
    model: str
    settings: Mapping[str, Any]
    keywords: Mapping[str, Any]

    def check(self) -> None:
        """Raise, before any weights are loaded, what would be raised after minutes.

        Raises:
            I2VError: for a model that is not there, or keywords that are not allowed.
        """
        from .checkpoints import find_checkpoint
        from .configuration import SETTINGS_OF_STAGE, load_settings
        from .request import Request, check_keywords

        keywords = check_keywords(self.task, self.keywords)
        _check_device(self.settings.get("device"))
        overrides = {name: value for name, value in self.settings.items() if name != "device"}
        if not os.path.exists(self.model):
            if not _is_hub_id(self.model):
                raise MissingFileError(
                    f"there is no folder {self.model!r}, nor is it an id on the hub, which is owner/name"
                )
            Request.resolve(SETTINGS_OF_STAGE[self.task](**overrides), keywords)
            return
        settings = load_settings(self.model, self.task, overrides)
        Request.resolve(settings, keywords)
        for name in _CHECKPOINTS:
            find_checkpoint(self.model, getattr(settings, name))

    def run(self, source: Any, output: str) -> None:
        """Make the video ``output`` of an image or a video, through ModelScope's own call."""
        from modelscope.outputs import OutputKeys
        from modelscope.pipelines import pipeline

        from .video import read_video

        start = time.monotonic()
        pipe = pipeline(self.task, model=self.model, **self._pipeline_name(), **self.settings)
        result = pipe(source, output_video=output, **self.keywords)
        path, seed = result[OutputKeys.OUTPUT_VIDEO], result["seed"]
        video = read_video(path)
        count, height, width, _ = video.frames.shape
        took = time.monotonic() - start
        _say(f"{path}: {count} frames of {width}x{height} at {video.fps:g} fps, seed {seed} ({took:.0f} s)")

    def _pipeline_name(self) -> dict[str, str]:
        """What ModelScope must be told to run stage two of a folder whose own task is stage one."""
        from .configuration import read_configuration
        from .plugin.registration import VIDEO_TO_VIDEO_PIPELINE

        if read_configuration(self.model).get("task") == self.task:
            return {}
        return {"pipeline_name": VIDEO_TO_VIDEO_PIPELINE}


def _check_device(device: str | None) -> None:
    """Refuse what ModelScope cannot use, or would silently replace by the CPU."""
    if device is None:
        return
    import torch

    match = re.fullmatch(r"cpu|(?:gpu|cuda)(?::([0-9]{1,4}))?", device)
    if match is None:
        raise InvalidInputError(f"--device: got {device!r}, allowed are cpu, gpu, cuda and cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and int(match[1] or 0) >= count:
        raise InvalidInputError(f"--device: got {device!r}, but torch finds {count or 'no'} CUDA GPUs here")


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None


def _download(model: str) -> str:
    """The folder of a model given by its id on the hub; of one given by its folder, that."""
    if os.path.exists(model):
        return model
    from modelscope.hub.snapshot_download import snapshot_download

    revision = REVISION if model in (IMAGE_TO_VIDEO_MODEL, VIDEO_TO_VIDEO_MODEL) else None
    try:
        return snapshot_download(model, revision=revision)
    except Exception as error:  # of many types, which differ between ModelScope's versions
        raise MissingFileError(
            f"there is no folder {model!r}, and the hub does not give a model of this id: {error}; "
            "with a downloaded model, give its folder"
        ) from error


def _release_memory() -> None:
    """Give back what a stage held, for the next."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _let_waiting_threads_sleep() -> None:
    """Keep OpenMP's threads from spinning, which makes small tensors slow where other programs run, too.

    Five times as slow, on two cores with four programs.
    """
    if "torch" not in sys.modules:  # which reads the variable when it is loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Without ModelScope's information lines, unless they are asked for."""
    if debug or "MODELSCOPE_LOG_LEVEL" in os.environ:
        yield
        return
    from modelscope.utils.logger import get_logger

    # Of the handlers: the logger's own level is set again whenever a module asks for the logger.
    levels = {handler: handler.level for handler in get_logger().handlers}
    try:
        for handler in levels:
            handler.setLevel(logging.WARNING)
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


def _given(**values: Any) -> dict[str, Any]:
    """Those that were spelled out."""
    return {name: value for name, value in values.items() if value is not None}


# --- the commands ---


def _demo(arguments: argparse.Namespace) -> None:
    _let_waiting_threads_sleep()
    from .images import open_image
    from .video import check_writable

    first, second = (os.path.join(arguments.output, name) for name in ("i2v_output.mp4", "v2v_output.mp4"))
    for path in (first, second):
        check_writable(path)
    _check_device(arguments.device)

    from .demo import EXAMPLE_IMAGE, demo_model

    source = arguments.image or str(EXAMPLE_IMAGE)
    image = open_image(source)
    folders = demo_model(
        arguments.cache, lambda folder: _say(f"Making a small model with random weights, once, in {folder}")
    )
    settings = _given(device=arguments.device)
    keywords = _given(seed=arguments.seed, progress=arguments.progress or None)
    stages = [
        _Stage(task, str(folder), settings, keywords)
        for task, folder in zip(("image-to-video", "video-to-video"), folders)
    ]
    for stage in stages:
        stage.check()
    _say("Loading ModelScope")
    with _quiet(arguments.debug):
        _say(f"Stage one, image to video, of {source}")
        stages[0].run(image, first)
        _say("Stage two, video to video, of stage one's")
        stages[1].run({"video_path": first}, second)
    _say(f"\n{_ABOUT_THE_WEIGHTS}")


def _generate(arguments: argparse.Namespace) -> None:
    from .images import open_image
    from .video import check_writable

    _check_refine_arguments(arguments)
    check_writable(arguments.output)
    if arguments.keep_first is not None:
        check_writable(arguments.keep_first)
    image = open_image(arguments.image)
    stages = _stages(arguments)
    for stage in stages:
        stage.check()
    with _quiet(arguments.debug):
        # Both models before the first is run: downloads fail more often than anything else.
        stages = [_downloaded(stage) for stage in stages]
        if len(stages) == 1:
            stages[0].run(image, arguments.output)
            return
        with tempfile.TemporaryDirectory(prefix="modelscope-i2v-") as temporary:
            first = arguments.keep_first or os.path.join(temporary, "i2v_output.mp4")
            stages[0].run(image, first)
            _release_memory()
            stages[1].run({"video_path": first}, arguments.output)


def _check_refine_arguments(arguments: argparse.Namespace) -> None:
    given = _given(
        text=arguments.text,
        refine_steps=arguments.refine_steps,
        refine_size=arguments.refine_size,
        keep_first=arguments.keep_first,
    )
    if arguments.refine is None and given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InvalidInputError(f"without --refine there is no stage two for {options}")
    if arguments.keep_first and os.path.realpath(arguments.keep_first) == os.path.realpath(arguments.output):
        raise InvalidInputError(f"--keep-first and --output are the same file, {arguments.output!r}")


def _stages(arguments: argparse.Namespace) -> list[_Stage]:
    """The stages that the arguments ask for."""
    settings = _given(device=arguments.device, precision=arguments.precision)
    both = _given(seed=arguments.seed, fps=arguments.fps, progress=arguments.progress or None)
    first = _given(
        steps=arguments.steps,
        guide_scale=arguments.guide_scale,
        max_frames=arguments.frames,
        resolution=arguments.size,
    )
    model = os.path.expanduser(arguments.model)
    stages = [_Stage("image-to-video", model, settings, {**both, **first})]
    if arguments.refine is not None:
        second = _given(
            text=arguments.text, steps=arguments.refine_steps, resolution=arguments.refine_size
        )
        refine = os.path.expanduser(arguments.refine) or _default_refine_model(model)
        stages.append(_Stage("video-to-video", refine, settings, {**both, **second}))
    return stages


def _default_refine_model(model: str) -> str:
    from .configuration import read_configuration, stages_in

    if os.path.isdir(model) and "video-to-video" in stages_in(read_configuration(model)):
        return model
    return VIDEO_TO_VIDEO_MODEL


def _downloaded(stage: _Stage) -> _Stage:
    """The stage with its model in a folder, which was checked."""
    if os.path.exists(stage.model):
        return stage
    stage = _Stage(stage.task, _download(stage.model), stage.settings, stage.keywords)
    stage.check()
    return stage


COMMANDS = (
    Command(
        "demo",
        "run both stages on a small model with random weights, in a minute or two, without a network",
        _add_demo_arguments,
        _demo,
    ),
    Command(
        "generate",
        "make a video of an image, and with --refine a larger, sharper one of that",
        _add_generate_arguments,
        _generate,
    ),
)
