"""A model folder made lean: only the weights that its stages need, as safetensors, in half precision.

What is written loads like any other model folder, and gives in that precision the very videos of its source:
casting a weight when it is converted or when it is loaded is the same.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from torch import Tensor
from tqdm import tqdm

from ..errors import ConfigurationError, InvalidInputError, OutputError
from ..media.files import atomic_file, check_replaceable, local_path
from ..settings.configuration import (
    FILE_NAME,
    SECOND_STAGE_SECTION,
    SETTINGS_OF_STAGE,
    StageSettings,
    VideoToVideoSettings,
    load_settings,
    read_configuration,
    section_of,
    stages_in,
)
from ..settings.rules import choice
from . import write_safetensors
from .lean import SUFFIX, LeanFile, arrange, needs_of

logger = logging.getLogger(__name__)

PRECISION_CHOICES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class WrittenFile:
    """A weights file of the new folder: of which network and which stages, and how many bytes."""

    name: str
    network: str
    stages: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Conversion:
    """What was written. ``size_before`` is that of all weights files that it was made of."""

    folder: Path
    files: tuple[WrittenFile, ...]
    size_before: int

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stage for file in self.files for stage in file.stages))

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def convert_folder(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    precision: str = "fp16",
    progress: bool | None = None,
) -> Conversion:
    """Write a lean model folder: safetensors, in half precision, of only what the stages need.

    It holds one CLIP file, one autoencoder (two, where the stages' differ) and the UNets. One tensor is
    read and cast at a time, which takes up to three times the largest: 0.6 GB for the published networks. The
    configuration is the source's but for names of files that are others now.

    Args:
        sources: a model folder, or one of each stage, in any order, which become one folder for both.
        output: the new folder: one that is not there yet, or is empty.
        precision: ``fp16``, ``bf16`` or ``fp32``, of all floating weights.
        progress: whether to show a bar on stderr; by default only on a terminal.

    Raises:
        InvalidInputError: for a precision that is not allowed, or folders that are not one of each stage.
        MissingFileError, ConfigurationError, CheckpointError: as loading raises them, and CheckpointError
            for a weight that is too large for the precision.
        OutputError: if ``output`` cannot be written, or the disk is too small. Nothing is left behind after
            this or any other exception.
    """
    choice(*PRECISION_CHOICES).check("precision", precision, InvalidInputError)
    folders = [Path(source) for source in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    folder_of_stage = _stages(folders)
    folder = _checked_output(output, folders)
    settings = {stage: load_settings(source, stage) for stage, source in folder_of_stage.items()}
    with ExitStack() as stack:
        needs = [
            need
            for stage, source in folder_of_stage.items()
            for need in needs_of(stage, settings[stage], source, stack)
        ]
        files = arrange(needs, precision)
        _check_disk_space(folder, files)
        configuration = _configuration_file(folder_of_stage, settings, files)
        with _all_or_nothing(folder, [*(file.name for file in files), FILE_NAME]):
            _write_weights(folder, files, progress)
            with _writing(folder / FILE_NAME) as temporary:  # last: it is what makes the folder a model
                Path(temporary).write_bytes(configuration)
    read = {need.part.path for need in needs}
    written = [WrittenFile(file.name, file.network, file.stages, file.size) for file in files]
    return Conversion(folder, tuple(written), _size_on_disk(read))


def size_in_words(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


# The folders


def _stages(folders: Sequence[Path]) -> dict[str, Path]:
    """Which folder each stage is in."""
    if len(folders) not in (1, 2):
        raise InvalidInputError(f"one model folder is needed, or one of each stage; got {len(folders)}")
    found: dict[str, Path] = {}
    for folder in folders:
        contents = read_configuration(folder)
        stages = stages_in(contents)
        if not stages:
            known = " nor ".join(SETTINGS_OF_STAGE)
            raise ConfigurationError(
                f"{folder / FILE_NAME}: describes neither {known}, but {contents.get('task')!r}"
            )
        for stage in stages:
            if stage in found:
                raise InvalidInputError(
                    f"'{found[stage]}' and '{folder}' both describe {stage}; one folder of each stage is "
                    "needed, or one that describes both"
                )
            found[stage] = folder
    return {stage: found[stage] for stage in SETTINGS_OF_STAGE if stage in found}


def _checked_output(output: Any, sources: Iterable[Path]) -> Path:
    """The absolute path of the new folder, if it can be made."""
    shown = local_path(output)
    try:
        folder = Path(os.path.realpath(shown))
        for source in sources:
            if Path(os.path.realpath(source)) in (folder, *folder.parents):
                raise OutputError(f"cannot write {shown!r}: it is, or is in, the model folder '{source}'")
        held = sorted(os.listdir(folder)) if os.path.lexists(folder) else []
    except NotADirectoryError as error:
        raise OutputError(f"cannot write {shown!r}: it is a file, not a folder") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise OutputError(f"cannot write {shown!r}: {getattr(error, 'strerror', None) or error}") from error
    if held:
        raise OutputError(
            f"cannot write {shown!r}: it is not empty, it holds {held[0]!r}; give a new folder, or empty it"
        )
    check_replaceable(folder / FILE_NAME)
    return folder


@contextmanager
def _all_or_nothing(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Makes the folder for files of these names; after an exception neither it nor they are there."""
    new_folders = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write '{folder}': {error.strerror or error}") from error
        yield
    except BaseException:
        for name in names:
            with suppress(OSError):
                os.unlink(folder / name)
        for path in new_folders:
            with suppress(OSError):  # another process may have put something there
                os.rmdir(path)
        raise


# The weights


def _write_weights(folder: Path, files: Sequence[LeanFile], progress: bool | None) -> None:
    total = sum(prod(shape) * dtype.itemsize for file in files for dtype, shape in file.layout.values())
    hidden = None if progress is None else not progress
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=hidden) as bar:

        def counted(tensor: Tensor) -> Tensor:
            bar.update(tensor.numel() * tensor.element_size())
            return tensor

        for file in files:
            with _writing(folder / file.name) as temporary:
                write_safetensors(temporary, file.layout, lambda name, file=file: counted(file.tensor(name)))
            logger.info("wrote %s", folder / file.name)


@contextmanager
def _writing(path: Path) -> Iterator[str]:
    """A temporary file in place of ``path``, and the system's errors as ours."""
    with atomic_file(path) as temporary:
        try:
            yield temporary
        except OSError as error:
            raise OutputError(f"cannot write '{path}': {error.strerror or error}") from error


def _check_disk_space(folder: Path, files: Iterable[LeanFile]) -> None:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    needed, free = sum(file.size for file in files), shutil.disk_usage(nearest).free
    if needed > free:
        raise OutputError(
            f"cannot write '{folder}': it will take {size_in_words(needed)}, and {size_in_words(free)} are "
            "free on that disk"
        )


def _size_on_disk(paths: Iterable[Path]) -> int:
    """Of files, of which some may be one under two names."""
    found = [os.stat(path) for path in paths]
    return sum({(each.st_dev, each.st_ino): each.st_size for each in found}.values())


# The configuration


def _configuration_file(
    folder_of_stage: Mapping[str, Path], settings: Mapping[str, StageSettings], files: Iterable[LeanFile]
) -> bytes:
    """The new ``configuration.json``: to the byte the old one where nothing has to be another."""
    first, *others = dict.fromkeys(folder_of_stage.values())
    before = read_configuration(first)
    contents = copy.deepcopy(before)
    for other in others:  # stage two's
        theirs = read_configuration(other)
        section = theirs.get(section_of(theirs, VideoToVideoSettings.stage), {})
        contents = {**contents, SECOND_STAGE_SECTION: section}
        contents = {**contents, **{name: value for name, value in theirs.items() if name not in contents}}
    for file in files:
        for need in file.needs:
            # The loader takes the safetensors file of the stem that is configured.
            if Path(need.configured).with_suffix(SUFFIX) != Path(file.name):
                section = contents.setdefault(section_of(contents, need.stage), {})
                _set_everywhere(section, need.setting, file.name)
    if contents == before:
        return (first / FILE_NAME).read_bytes()
    text = json.dumps(contents, indent=4, ensure_ascii=False)
    # Half a surrogate pair, which only JSON's escape can spell, becomes that escape.
    return text.encode("utf-8", "backslashreplace")


def _set_everywhere(section: dict[str, Any], setting: str, value: str) -> None:
    """A setting of a section, in whichever of its parts it stands."""
    parts = [section[part] for part in ("model_args", "model_cfg") if setting in section.get(part, {})]
    for part in parts or [section.setdefault("model_args", {})]:
        part[setting] = value
