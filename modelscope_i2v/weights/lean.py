"""Which weights files a lean model folder has, and which tensors of which sources each of them holds."""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterable, Iterator

import torch
from torch import Tensor

from ..engine.precision import select_dtype
from ..errors import CheckpointError
from ..settings.configuration import StageSettings
from . import Checkpoint, check_weights, open_checkpoint, safetensors_size
from .parts import Part, stage_parts

SUFFIX = ".safetensors"

#: Where a weight that is too large for a precision fits.
_WIDER = {"fp16": "bf16", "bf16": "fp32"}

#: By a stage's parts: what they are called, and the setting that names their file.
_NETWORKS = {
    "clip_encoder": ("CLIP", "ckpt_clip"),
    "autoencoder": ("autoencoder", "ckpt_autoencoder"),
    "generator": ("UNet", "ckpt_unet"),
}


@dataclass(frozen=True)
class Need:
    """What a stage needs of one of its weights files: these keys, below the part's prefix."""

    stage: str
    network: str
    setting: str
    configured: str
    part: Part
    checkpoint: Checkpoint
    keys: frozenset[str]


@dataclass(frozen=True)
class LeanFile:
    """A weights file to write, from which each of ``needs`` will be loaded."""

    name: str
    needs: tuple[Need, ...]
    precision: str

    @property
    def network(self) -> str:
        return self.needs[0].network

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(need.stage for need in self.needs)

    @cached_property
    def size(self) -> int:
        """In bytes."""
        return safetensors_size(self.layout)

    @cached_property
    def _sources(self) -> dict[str, tuple[Need, str]]:
        """Where each of its tensors comes from, in the order of the source."""
        found: dict[str, tuple[Need, str]] = {}
        for need in self.needs:
            for key in need.checkpoint:
                if key in need.keys:
                    found.setdefault(need.part.prefix + key, (need, key))
        return found

    @cached_property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and the shape of each of its tensors."""
        entries = {}
        for name, (need, key) in self._sources.items():
            stored = need.checkpoint[key]
            dtype = _dtype(self.precision) if stored.dtype.is_floating_point else stored.dtype
            entries[name] = (dtype, stored.shape)
        return entries

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, read and cast.

        Raises:
            CheckpointError: if it cannot be read, or a finite value is too large for the precision.
        """
        return _converted(*self._sources[name], self.precision)


def needs_of(stage: str, settings: StageSettings, folder: Path, stack: ExitStack) -> Iterator[Need]:
    """What a stage needs of each of its files, which are checked against the networks and opened."""
    for part_name, part in stage_parts(settings, folder).items():
        check_weights(part.weights, part.path, part.prefix, ignore=part.ignored)
        checkpoint = stack.enter_context(open_checkpoint(part.path, part.prefix))
        network, setting = _NETWORKS[part_name]
        keys = frozenset(part.weights.state_dict())
        yield Need(stage, network, setting, getattr(settings, setting), part, checkpoint, keys)


def arrange(needs: Iterable[Need], precision: str) -> list[LeanFile]:
    """The files to write: a network that both stages have is written once if it is the same."""
    files: list[LeanFile] = []
    for need in needs:
        for index, file in enumerate(files):
            if need.setting == file.needs[0].setting and _can_share(file.needs[0], need, precision):
                files[index] = LeanFile(file.name, (*file.needs, need), precision)
                break
        else:
            name = _distinct_name(need, {file.name.casefold() for file in files})
            files.append(LeanFile(name, (need,), precision))
    return files


def _can_share(first: Need, second: Need, precision: str) -> bool:
    """Whether one file can serve both: neither minds what only the other needs, and the rest is the same.

    Of CLIP, each stage needs another tower, and minds neither of them.
    """
    only_first, only_second = first.keys - second.keys, second.keys - first.keys
    if not (only_first <= second.part.ignored and only_second <= first.part.ignored):
        return False
    if os.path.samefile(first.part.path, second.part.path):
        return True
    common = sorted(first.keys & second.keys)
    if any(first.checkpoint[key].shape != second.checkpoint[key].shape for key in common):
        return False
    return all(
        _is_same(_converted(first, key, precision), _converted(second, key, precision)) for key in common
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same to the bit, where NaN is NaN."""
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bits)


def _distinct_name(need: Need, taken: set[str]) -> str:
    """The file's name: the old one's stem, and the stage besides where that is taken."""
    stem = Path(need.configured).with_suffix("").name
    numbered = (f"{stem}-{need.stage}-{number}" for number in itertools.count(2))
    stems = itertools.chain((stem, f"{stem}-{need.stage}"), numbered)
    return next(each + SUFFIX for each in stems if (each + SUFFIX).casefold() not in taken)


def _converted(need: Need, key: str, precision: str) -> Tensor:
    """A tensor of a source in its new dtype."""
    tensor = need.checkpoint.read(key)
    dtype = _dtype(precision)
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if converted.isfinite().all():
        return converted
    wide = tensor.double()
    lost = wide[wide.isfinite() & ~converted.isfinite()]
    if lost.numel():
        advice = f"; convert it to {_WIDER[precision]} instead" if precision in _WIDER else ""
        raise CheckpointError(
            f"The weights file '{need.part.path}' cannot be converted to {precision}: its tensor "
            f"{need.part.prefix + key!r} holds {lost.abs().max().item():g}, and {precision} goes up to "
            f"{torch.finfo(dtype).max:g}{advice}."
        )
    return converted


def _dtype(precision: str) -> torch.dtype:
    return select_dtype(precision, torch.device("cpu"))
