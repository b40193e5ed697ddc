"""Converting model folders: only the weights that the stages need, as safetensors, in half precision.

What is written loads like any other model folder, and gives in that precision the very videos of its source:
casting a weight when it is converted or when it is loaded is the same.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from ..errors import ConfigurationError, I2VError, InvalidInputError, OutputError
from ..media.files import local_path
from ..settings.configuration import (
    FILE_NAME,
    SECOND_STAGE_SECTION,
    load_settings,
    read_configuration,
    section_of,
    stages_in,
)
from ..settings.request import with_scales
from ..settings.rules import choice
from ..settings.stages import SETTINGS_OF_STAGE, StageSettings, VideoToVideoSettings
from .adapters import file_sha256, find_adapter, merged_weight, read_changes, stage_of_adapter
from .loading import PRECISIONS, check_weights, open_checkpoint
from .parts import Part, stage_parts

PathLike = Union[str, "os.PathLike[str]"]

SUFFIX = ".safetensors"
_WRAPPER = """# Imported by ModelScope with trust_remote_code=True; pip install modelscope_i2v
import modelscope_i2v  # noqa: F401
"""

#: What the networks are called, by the setting that names their file.
_NETWORKS = {"ckpt_clip": "CLIP", "ckpt_autoencoder": "autoencoder", "ckpt_unet": "UNet"}


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
    sources: PathLike | Sequence[PathLike],
    output: PathLike,
    precision: str = "fp16",
    progress: bool | None = None,
    lora: PathLike | Sequence[PathLike] = (),
    lora_scale: float | Sequence[float] = 1.0,
    allow_remote: bool = False,
) -> Conversion:
    """Write a lean model folder: safetensors, in half precision, of only what the stages need.

    It holds one CLIP file, one autoencoder (two, where the stages' differ) and the UNets. It takes the memory
    of the largest network in the new precision: 2.8 GB for the published ones. The configuration is the
    source's but for names of files that are others now.

    Args:
        sources: a model folder, or one of each stage, in any order, which become one folder for both.
        output: the new folder: one that is not there yet, or is empty.
        precision: ``fp16``, ``bf16`` or ``fp32``, of all floating weights.
        progress: whether to show a bar on stderr; by default only on a terminal.
        lora: adapters to merge, each into the UNet of the stage that it is for.
        lora_scale: their strength, of all or of each.
        allow_remote: whether to follow ModelScope's convention for models with code: an ``ms_wrapper.py``
            that imports this package, and ``allow_remote`` in the configuration. The folder then loads with
            ``trust_remote_code=True`` where the start-up hook is off, and is refused without it.

    Raises:
        InvalidInputError: for a precision that is not allowed, or folders that are not one of each stage.
        MissingFileError, ConfigurationError, CheckpointError, NotEnoughMemoryError: as loading raises them.
        OutputError: if ``output`` cannot be written, or the disk is too small. Nothing is left behind after
            this or any other exception.
    """
    choice(*PRECISIONS).check("precision", precision, InvalidInputError)
    folders = [Path(source) for source in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    folder_of_stage = _stages(folders)
    dtype = PRECISIONS[precision]
    with _new_folder(output, folders) as (target, temporary):
        needs = [need for stage, source in folder_of_stage.items() for need in _needs(stage, source)]
        adapters = _adapters(needs, lora, lora_scale)
        files = _arrange(needs, dtype)
        _check_disk_space(target, temporary, files, dtype)
        written = _write_weights(temporary, files, dtype, progress, adapters)
        (temporary / FILE_NAME).write_bytes(_configuration_file(folder_of_stage, files, allow_remote))
        if allow_remote:
            (temporary / "ms_wrapper.py").write_text(_WRAPPER, encoding="utf-8")
        found = [os.stat(path) for path in {need.part.path for need in needs}]
    before = {(each.st_dev, each.st_ino): each.st_size for each in found}  # links to one file count once
    return Conversion(target, tuple(written), sum(before.values()))


def size_in_words(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


# The folders


def _stages(folders: Sequence[Path]) -> dict[str, Path]:
    """Return which folder each stage is in."""
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


@contextmanager
def _new_folder(output: Any, sources: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield the new folder and a temporary one on the same disk, whose files go to the new one at the end."""
    shown = local_path(output)
    try:
        if "\0" in shown:
            raise OutputError(f"cannot write {shown!r}: it has a null character")
        target = Path(os.path.realpath(shown))
        for source in sources:
            if Path(os.path.realpath(source)) in (target, *target.parents):
                raise OutputError(f"cannot write {shown!r}: it is, or is in, the model folder '{source}'")
        if target.is_file():
            raise OutputError(f"cannot write {shown!r}: it is a file, not a folder")
        held = sorted(os.listdir(target)) if os.path.lexists(target) else []
        if held:
            fault = f"it is not empty, it holds {held[0]!r}; give a new folder, or empty it"
            raise OutputError(f"cannot write {shown!r}: {fault}")
        base = next(path for path in (target, *target.parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=base) as temporary:
            yield target, Path(temporary)
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == FILE_NAME):
                os.replace(path, target / path.name)  # the configuration last: it makes the folder a model
    except (OSError, SafetensorError) as error:
        if isinstance(error, I2VError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {shown!r}: {reason}") from error


def _check_disk_space(
    target: Path, there: Path, files: Mapping[str, Sequence[_Need]], dtype: torch.dtype
) -> None:
    weights = [value for needs in files.values() for need in needs for value in need.state.values()]
    needed = sum(dtype.itemsize * value.numel() + 200 for value in weights)  # 200 in the header
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(
            f"cannot write '{target}': it will take {size_in_words(needed)}, and {size_in_words(free)} are "
            "free on that disk"
        )


# The weights


class _Need(NamedTuple):
    """What a stage needs of one of its weights files, and the name that is configured for it."""

    stage: str
    part: Part
    configured: str

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The weights, on the meta device, by their keys without the prefix."""
        return self.part.weights.state_dict()


def _needs(stage: str, folder: Path) -> Iterator[_Need]:
    """Yield what a stage needs of each of its files, which are checked against the networks."""
    settings = load_settings(folder, stage)
    for part in stage_parts(settings, folder).values():
        check_weights(part.weights, part.path, part.prefix, ignore=part.ignored)
        yield _Need(stage, part, getattr(settings, part.setting))


def _arrange(needs: Sequence[_Need], dtype: torch.dtype) -> dict[str, list[_Need]]:
    """Return the files to write by name: a network that both stages have, and the same, is written once."""
    files: dict[str, list[_Need]] = {}
    for need in needs:
        shared = next((held for held in files.values() if _can_share(held[0], need, dtype)), None)
        if shared is not None:
            shared.append(need)
            continue
        stem, taken = Path(need.configured).with_suffix("").name, {name.casefold() for name in files}
        ends = ("", f"-{need.stage}", *(f"-{need.stage}-{number}" for number in (2, 3, 4)))
        names = (stem + end + SUFFIX for end in ends)
        files[next(name for name in names if name.casefold() not in taken)] = [need]
    return files


def _can_share(first: _Need, second: _Need, dtype: torch.dtype) -> bool:
    """Return whether one file can serve both: neither minds what only the other needs; the rest is the same.

    Of CLIP, each stage needs another tower, and minds neither of them.
    """
    one, other = first.part, second.part
    ours, theirs = first.state.keys(), second.state.keys()
    if one.setting != other.setting or not (ours - theirs <= other.ignored and theirs - ours <= one.ignored):
        return False
    if os.path.samefile(one.path, other.path):
        return True
    with open_checkpoint(one.path, one.prefix) as a, open_checkpoint(other.path, other.prefix) as b:
        return all(torch.equal(a.read(key, dtype=dtype), b.read(key, dtype=dtype)) for key in ours & theirs)


def _adapters(needs: Sequence[_Need], lora: Any, lora_scale: Any) -> dict[str, list[tuple[Path, float]]]:
    """Return the adapters to merge and their scales, by the stage that each is for."""
    declared = StageSettings.declared()
    paths, scales = with_scales(
        declared["lora"].rule.check("lora", lora, InvalidInputError),
        declared["lora_scale"].rule.check("lora_scale", lora_scale, InvalidInputError),
    )
    unets = {need.stage: need.part.network for need in needs if need.part.setting == "ckpt_unet"}
    adapters: dict[str, list[tuple[Path, float]]] = {}
    for path, scale in zip(map(find_adapter, paths), scales):
        adapters.setdefault(stage_of_adapter(path, unets), []).append((path, scale))
    return adapters


def _origin(adapters: Sequence[tuple[Path, float]]) -> dict[str, str]:
    """Return what a weights file says of the adapters that are in it, if any."""
    each = [{"name": path.name, "sha256": file_sha256(path), "scale": scale} for path, scale in adapters]
    return {"lora": json.dumps(each)} if each else {}


def _write_weights(
    folder: Path,
    files: Mapping[str, Sequence[_Need]],
    dtype: torch.dtype,
    progress: bool | None,
    adapters: Mapping[str, Sequence[tuple[Path, float]]],
) -> list[WrittenFile]:
    total = sum(len(set().union(*(need.state for need in needs))) for needs in files.values())
    hidden = None if progress is None else not progress
    written = []
    with tqdm(total=total, desc="converting", unit=" weights", disable=hidden) as bar:
        for name, needs in files.items():
            weights: dict[str, torch.Tensor] = {}
            for need in needs:
                path, prefix = need.part.path, need.part.prefix
                with open_checkpoint(path, prefix) as checkpoint:
                    for key in need.state:
                        if prefix + key not in weights:
                            weights[prefix + key] = checkpoint.read(key, dtype=dtype)
                            bar.update()
            merged = adapters.get(needs[0].stage, ()) if needs[0].part.setting == "ckpt_unet" else ()
            for key, changes in read_changes(merged, needs[0].part.network, needs[0].stage).items():
                weights[key] = merged_weight(key, weights[key], changes)
            save_file(weights, folder / name, metadata={"format": "pt", **_origin(merged)})
            stages, size = tuple(need.stage for need in needs), (folder / name).stat().st_size
            written.append(WrittenFile(name, _NETWORKS[needs[0].part.setting], stages, size))
    return written


# The configuration


def _configuration_file(
    folder_of_stage: Mapping[str, Path], files: Mapping[str, Sequence[_Need]], allow_remote: bool
) -> bytes:
    """Return the new ``configuration.json``: to the byte the old one where nothing has to be another."""
    first, *others = dict.fromkeys(folder_of_stage.values())
    before = read_configuration(first)
    contents = copy.deepcopy(before)
    for other in others:  # stage two's
        theirs = read_configuration(other)
        section = theirs.get(section_of(theirs, VideoToVideoSettings.stage), {})
        contents = {**theirs, **contents, SECOND_STAGE_SECTION: section}
    for name, needs in files.items():
        for need in needs:
            # The loader takes the safetensors file of the stem that is configured.
            if Path(need.configured).with_suffix(SUFFIX) != Path(name):
                section = contents.setdefault(section_of(contents, need.stage), {})
                holders = [
                    each for each in ("model_args", "model_cfg") if need.part.setting in section.get(each, {})
                ]
                for holder in holders or ["model_args"]:
                    section.setdefault(holder, {})[need.part.setting] = name
    if allow_remote:
        contents["allow_remote"] = True
    if contents == before:
        return (first / FILE_NAME).read_bytes()
    text = json.dumps(contents, indent=4, ensure_ascii=False)
    # Half a surrogate pair, which only JSON's escape can spell, becomes that escape.
    return text.encode("utf-8", "backslashreplace")
