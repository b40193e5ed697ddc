"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): read, checked, merged, taken out again.

A layer's weight becomes W + scale * alpha / rank * B A. That is computed in float32 on the CPU, wherever the
network is: the same adapters give the same weights on every device. The weights that were there before are
kept, so that they come back to the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, MissingFileError, redact
from ..models.unet import UNet
from ..settings.stages import StageSettings
from .formats import quote_some
from .loading import Checkpoint, open_checkpoint, precision_name

#: In a folder with several files, the one that is meant: this package's, peft's and diffusers' names.
_FILE_NAMES = ("adapter.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")

#: What peft, diffusers and kohya's scripts call the parts of an adapter; kohya's layers have ``_`` for ``.``.
_KEY = re.compile(
    r"(?:base_model\.model\.|unet\.|diffusion_model\.)?(?P<layer>.+?)(?:\.lora)?\."
    r"(?P<part>lora_A|lora_B|lora_down|lora_up|down|up|alpha)(?:\.default)?(?:\.weight)?"
)
_KOHYA_PREFIX = "lora_unet_"
_PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}

#: Of peft's variants, by the names in its configuration: another formula than the one above.
_OTHER_FORMULAS = ("use_dora", "use_rslora", "alpha_pattern")


@dataclass(frozen=True)
class Change:
    """A change of one weight: ``scale`` times up [out, rank] times down [rank, in]."""

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True)
class _Layer:
    """A layer's keys in an adapter's file, by part: ``down``, ``up`` and perhaps ``alpha``."""

    weight: str
    keys: dict[str, str] = field(default_factory=dict)


def find_adapter(path: str | os.PathLike, folder: str | os.PathLike = "") -> Path:
    """Return the file of an adapter, given by its path or its folder's.

    Args:
        path: if there is nothing under a relative one, it is looked for in ``folder``.
        folder: the model's.

    Raises:
        MissingFileError: if there is none.
        CheckpointError: if a folder holds several and none has a usual name.
    """
    given = Path(path).expanduser()
    found = next((each for each in (given, Path(folder) / given) if each.exists()), None)
    if found is None:
        raise MissingFileError(f"There is no LoRA adapter {redact(str(path))!r}: give a file or its folder.")
    if not found.is_dir():
        return found
    names = sorted(each.name for each in found.glob("*.safetensors"))
    usual = [name for name in _FILE_NAMES if name in names]
    if len(names) == 1 or usual:
        return found / (usual or names)[0]
    if not names:
        raise MissingFileError(f"There is no LoRA adapter in '{found}': it holds no .safetensors file.")
    raise CheckpointError(f"Which LoRA adapter in '{found}'? It holds {quote_some(names)}: give one of them.")


def check_adapters(paths: Iterable[str], folder: str | os.PathLike, settings: StageSettings) -> None:
    """Raise what a stage would raise when it uses adapters, as far as it is known without its weights.

    Raises:
        MissingFileError, CheckpointError: as of ``find_adapter`` and ``check_adapter``.
    """
    files = [find_adapter(path, folder) for path in paths]
    if files:
        with torch.device("meta"):
            unet = UNet(settings.unet)
        for file in files:
            check_adapter(file, unet, settings.stage)


def check_adapter(path: Path, network: nn.Module, stage: str) -> None:
    """Raise what ``read_adapter`` would raise before it reads any numbers.

    Raises:
        CheckpointError: if the file cannot be read, or is not an adapter of this stage's network.
    """
    with open_checkpoint(path) as checkpoint:
        _check_stage(path, _metadata(path), stage)
        _layers(checkpoint, network)


def read_adapter(path: Path, network: nn.Module, stage: str) -> dict[str, Change]:
    """Return an adapter's changes by the names of the network's weights.

    Args:
        path: of the file.
        network: what it shall fit; it may be on the meta device.
        stage: the network's; an adapter that says that it was trained for another is refused.

    Raises:
        CheckpointError: if the file cannot be read, is not an adapter of this stage's network, or holds
            numbers that are not finite.
    """
    metadata = _metadata(path)
    with open_checkpoint(path) as checkpoint:
        _check_stage(path, metadata, stage)
        alpha = _alpha(path, metadata)
        changes = {}
        for layer in _layers(checkpoint, network):
            down, up = (checkpoint.read(layer.keys[part], dtype=torch.float32) for part in ("down", "up"))
            rank = len(down)
            own = checkpoint.read(layer.keys["alpha"]).item() if "alpha" in layer.keys else alpha
            scale = 1.0 if own is None else own / max(rank, 1)
            changes[layer.weight] = Change(up.flatten(1), down.flatten(1), scale)
        return changes


def stage_of_adapter(path: Path, networks: Mapping[str, nn.Module]) -> str:
    """Return the stage that an adapter is for, of networks by their stages.

    Raises:
        CheckpointError: if it fits none of them.
    """
    named = _metadata(path).get("stage")
    faults = []
    for stage in sorted(networks, key=lambda stage: stage != named):
        try:
            check_adapter(path, networks[stage], stage)
            return stage
        except CheckpointError as error:
            faults.append(error)
    raise faults[0]


def read_changes(
    adapters: Iterable[tuple[Path, float]], network: nn.Module, stage: str
) -> dict[str, list[Change]]:
    """Return the changes of adapters, of a file and a scale each, by weight, as of ``read_adapter``."""
    changes: dict[str, list[Change]] = {}
    for path, scale in adapters:
        for name, change in read_adapter(path, network, stage).items():
            changes.setdefault(name, []).append(Change(change.up, change.down, scale * change.scale))
    return changes


def merged_weight(name: str, weight: Tensor, changes: Iterable[Change]) -> Tensor:
    """Return a weight with changes added, in its own type, on the CPU.

    Raises:
        CheckpointError: if it is not finite.
    """
    total = weight.to("cpu", torch.promote_types(weight.dtype, torch.float32), copy=True)
    for change in changes:
        total += (change.scale * (change.up @ change.down)).reshape(total.shape)
    merged = total.to(weight.dtype)
    if not merged.isfinite().all():
        raise CheckpointError(
            f"With these LoRA adapters the weight '{name}' is not finite in {precision_name(weight.dtype)}: "
            "use a smaller lora_scale, or precision fp32."
        )
    return merged


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"The LoRA adapter '{path}' cannot be read: {error}.") from error
    return digest.hexdigest()


class MergedAdapters:
    """The adapters that are merged into a network's weights at present.

    Attributes:
        network: whose weights are changed in place.
        merged: SHA-256 of each adapter's file, and its scale.
    """

    def __init__(self, network: nn.Module, stage: str):
        self.network, self._stage = network, stage
        self.merged: tuple[tuple[str, float], ...] = ()
        self._originals: dict[str, Tensor] = {}  # by weight, on the CPU

    @torch.no_grad()
    def use(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """Merge these adapters and no others.

        Args:
            adapters: each one's file and scale; none gives the network's own weights.

        Raises:
            CheckpointError: as of ``read_adapter``, or if a weight is no longer finite; then the network is
                as it was before, or has no adapter.
        """
        wanted = tuple((file_sha256(path), scale) for path, scale in adapters)
        if wanted == self.merged:
            return
        changes = read_changes(adapters, self.network, self._stage)
        self.remove()
        try:
            for name, of_weight in changes.items():
                weight = self.network.get_parameter(name)
                original = weight.detach().to("cpu", copy=True)
                merged = merged_weight(name, original, of_weight)
                self._originals[name] = original
                weight.copy_(merged)
        except BaseException:
            self.remove()
            raise
        self.merged = wanted

    @torch.no_grad()
    def remove(self) -> None:
        """Give the network its own weights back."""
        for name, original in self._originals.items():
            self.network.get_parameter(name).copy_(original)
        self._originals, self.merged = {}, ()


def _layers(checkpoint: Checkpoint, network: nn.Module) -> list[_Layer]:
    """Return the layers of an adapter, if each is one of the network's and has its shape."""
    weights = {key: each for key, each in network.named_parameters() if each.ndim > 1}
    names = {key.removesuffix(".weight"): key for key in weights}
    names.update({_KOHYA_PREFIX + name.replace(".", "_"): key for name, key in names.items()})
    layers: dict[str, _Layer] = {}
    foreign, unknown = list(checkpoint.others), []
    for key in checkpoint:
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
        elif match["layer"] not in names:
            unknown.append(match["layer"])
        else:
            weight = names[match["layer"]]
            part = _PARTS.get(match["part"], match["part"])
            layers.setdefault(weight, _Layer(weight)).keys[part] = key
    misshapen = [
        _describe(each, checkpoint, weights)
        for each in layers.values()
        if not _fits(each, checkpoint, weights)
    ]
    faults = {
        "keys that are no LoRA's": foreign,
        "layers that the network has not": list(dict.fromkeys(unknown)),
        "layers of another shape": misshapen,
    }
    shown = [f"{len(found)} {fault} ({quote_some(found)})" for fault, found in faults.items() if found]
    if not shown and not layers:
        shown = ["it holds no tensors"]
    if shown:
        raise _unfit(checkpoint.path, f"{'; '.join(shown)}")
    return list(layers.values())


def _fits(layer: _Layer, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> bool:
    if not {"down", "up"} <= layer.keys.keys():
        return False
    down, up = (checkpoint[layer.keys[part]] for part in ("down", "up"))
    weight, rank = weights[layer.weight], (*down.shape, 0)[0]
    fits = (*up.shape[:1], *down.shape[1:]) == tuple(weight.shape)
    inner = math.prod(up.shape[1:]) == rank and min(len(up.shape), len(down.shape)) > 1
    alpha = "alpha" not in layer.keys or math.prod(checkpoint[layer.keys["alpha"]].shape) == 1
    return fits and inner and alpha and down.dtype.is_floating_point and up.dtype.is_floating_point


def _describe(layer: _Layer, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> str:
    found = ", ".join(f"{part} {list(checkpoint[key].shape)}" for part, key in layer.keys.items())
    return f"{layer.weight}: {found} for {list(weights[layer.weight].shape)}"


def _check_stage(path: Path, metadata: Mapping[str, str], stage: str) -> None:
    trained_for = metadata.get("stage", stage)
    if trained_for != stage:
        raise _unfit(path, f"it was trained for {trained_for}, and this is {stage}")


def _alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """Return the alpha of all layers, from the file or from peft's configuration beside it, if any."""
    config: dict[str, Any] = {}
    beside = path.with_name("adapter_config.json")
    try:
        if "alpha" in metadata:
            return _finite(float(metadata["alpha"]))
        if beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        other = [name for name in _OTHER_FORMULAS if config.get(name)]
        alpha = None if config.get("lora_alpha") is None else _finite(float(config["lora_alpha"]))
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
        raise _unfit(path, f"its alpha cannot be read: {error}") from error
    if other:
        raise _unfit(path, f"it was made with {', '.join(other)}, which is not supported")
    return alpha


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file says of itself; nothing of one that cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _unfit(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"The LoRA adapter '{path}' does not fit: {reason}.")
