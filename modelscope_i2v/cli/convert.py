"""``modelscope-i2v convert``: a lean model folder out of downloaded ones."""

from __future__ import annotations

import argparse
import os

from ..settings.stages import StageSettings
from .command import Command, echo, without_none
from .flags import add_flags, values_of

_LORA = [StageSettings.declared()[name] for name in ("lora", "lora_scale")]


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help="a model folder")
    add("other_folder", nargs="?", metavar="DIR2", help="the other stage's, to make one folder of both")
    add("output", metavar="OUT", help="the folder to write, which is not there yet, or is empty")
    add("--precision", metavar="P", help="of the weights: fp16 (default), bf16 or fp32")
    add_flags(parser, _LORA)
    add("--allow-remote", action="store_true",
        help="add ms_wrapper.py: it then loads with trust_remote_code=True, hook or no")  # fmt: skip
    add("--progress", action="store_true", help="show a progress bar, not only on a terminal")


def _convert(arguments: argparse.Namespace) -> None:
    from ..weights.conversion import convert_folder, size_in_words

    sources = [os.path.expanduser(each) for each in (arguments.folder, arguments.other_folder) if each]
    options = without_none(precision=arguments.precision, progress=arguments.progress or None)
    options["allow_remote"] = arguments.allow_remote
    done = convert_folder(sources, arguments.output, **options, **values_of(arguments, _LORA))
    for file in done.files:
        path = os.path.join(arguments.output, file.name)
        echo(f"{path}: {size_in_words(file.size)}, {file.network} for {' and '.join(file.stages)}")
    sizes = f"{size_in_words(done.size_before)} of weights before, {size_in_words(done.size)} now"
    echo(f"{arguments.output}: a model for {' and '.join(done.stages)}: {sizes}")


CONVERT = Command(
    "convert",
    "write a lean model folder: half precision, safetensors, only what is needed, both stages in one",
    _add_convert_arguments,
    _convert,
)
