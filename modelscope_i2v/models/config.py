"""The networks' architectures as checked dataclasses. Neither torch nor open_clip is imported for them.

Bounds are of what could be a network at all: a slip in a file must not ask for thousands of blocks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import ConfigurationError, describe

ATTENTION_CHOICES = ("auto", "sdpa", "xformers")
LAYER_CHOICES = ("penultimate", "last")

#: The most levels of a network, each half as large as the one before.
MAX_LEVELS = 8


def _bounded(default: Any, low: float, high: float, fewest: int = 1) -> Any:
    """A field whose value, or each of ``fewest`` entries or more, is a number from ``low`` to ``high``."""
    return field(default=default, metadata={"bounds": (low, high), "fewest": fewest})


def _check_bounds(config: Any, section: str) -> None:
    for each in dataclasses.fields(config):
        if each.metadata:
            value, is_list = getattr(config, each.name), isinstance(each.default, tuple)
            _check_numbers(f"{section}: {each.name}", value, **each.metadata, is_list=is_list)


def _check_numbers(
    name: str, value: Any, bounds: tuple[float, float], is_list: bool, fewest: int = 1
) -> None:
    """Refuse what is not a number within bounds, whole if they are, or a list of one for each level."""
    low, high = bounds
    whole = isinstance(high, int)
    entries = value if is_list and isinstance(value, (list, tuple)) else [value]
    fit = is_list == isinstance(value, (list, tuple)) and all(
        isinstance(entry, int if whole else (int, float))
        and not isinstance(entry, bool)
        and low <= entry <= high
        for entry in entries
    )
    if not fit or not fewest <= len(entries) <= MAX_LEVELS:
        allowed = f"a {'whole ' if whole else ''}number from {low} to {high}"
        allowed = f"a list of {fewest} to {MAX_LEVELS} entries, each {allowed}" if is_list else allowed
        got = list(value) if isinstance(value, tuple) else value  # as a file has it
        raise ConfigurationError(f"{name}: got {describe(got)}, allowed is {allowed}")


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of the UNet; the defaults are the published one's.

    ``image_conditioned`` is stage one: an image embedding becomes ``num_tokens`` context tokens, and the
    frame rate is embedded beside the timestep. Otherwise the context is used as it comes (stage two).
    ``row_padding`` is the zero padding, in rows, of the strided convolutions: stage two was trained
    with 2, and each of its upsamplings takes the surplus row off again at either edge.
    """

    image_conditioned: bool = True
    row_padding: int = 1
    in_dim: int = _bounded(4, 1, 1024)
    dim: int = _bounded(320, 1, 4096)
    y_dim: int = _bounded(1024, 1, 16_384)
    context_dim: int = _bounded(1024, 1, 16_384)
    out_dim: int = _bounded(4, 1, 1024)
    dim_mult: tuple[int, ...] = _bounded((1, 2, 4, 4), 1, 64)
    num_heads: int = _bounded(8, 1, 256)
    head_dim: int = _bounded(64, 1, 1024)
    num_res_blocks: int = _bounded(2, 1, 16)
    attn_scales: tuple[float, ...] = _bounded((1.0, 0.5, 0.25), 0.0, 1.0, fewest=0)
    num_tokens: int = _bounded(4, 1, 1024)
    default_fps: int = _bounded(8, 1, 240)
    num_groups: int = _bounded(32, 1, 4096)

    def __post_init__(self):
        _check_bounds(self, "UNet")
        if not self.image_conditioned and self.y_dim != self.context_dim:
            raise ConfigurationError(
                f"UNet: y_dim {self.y_dim} and context_dim {self.context_dim} must be equal in stage two"
            )
        if self.dim % 2:
            raise ConfigurationError(f"UNet: dim must be even, got {self.dim}")
        for level, multiple in enumerate(self.dim_mult):
            width, divisors = self.dim * multiple, {"num_groups": self.num_groups}
            if 0.5**level in self.attn_scales or level == len(self.dim_mult) - 1:  # as the middle attends
                divisors["head_dim"] = self.head_dim
            for name, divisor in divisors.items():
                if width % divisor:
                    raise ConfigurationError(
                        f"UNet: dim x dim_mult[{level}] is {width}, and must be a multiple of "
                        f"{name} {divisor}"
                    )

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the smallest latent size from (height, width) up that down- and upsampling return to."""
        multiple = 2 ** (len(self.dim_mult) - 1)
        surplus = 2 * (self.row_padding - 1)
        rows = math.ceil(max(height - surplus, 0) / multiple) * multiple + surplus
        return max(rows, surplus or multiple), math.ceil(width / multiple) * multiple


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of the autoencoder; the defaults are Stable Diffusion's."""

    in_channels: int = _bounded(3, 1, 1024)
    out_ch: int = _bounded(3, 1, 1024)
    ch: int = _bounded(128, 1, 4096)
    ch_mult: tuple[int, ...] = _bounded((1, 2, 4, 4), 1, 64)
    num_res_blocks: int = _bounded(2, 1, 16)
    z_channels: int = _bounded(4, 1, 1024)
    embed_dim: int = _bounded(4, 1, 1024)
    num_groups: int = _bounded(32, 1, 4096)

    def __post_init__(self):
        _check_bounds(self, "auto_encoder")
        if self.ch % self.num_groups:
            raise ConfigurationError(
                f"auto_encoder: ch must be a multiple of num_groups {self.num_groups}, got {self.ch}"
            )

    @property
    def downscale(self) -> int:
        """Pixels along a side of one latent position."""
        return 2 ** (len(self.ch_mult) - 1)


#: What a tower's section may hold, with bounds. Other keys of open_clip's make it ask a hub, or open pickles
#: of other libraries.
CLIP_KEYS: dict[str, dict[str, tuple[float, float]]] = {
    "vision_cfg": {
        "image_size": (1, 4096), "layers": (1, 256), "width": (1, 16_384), "head_width": (1, 1024),
        "patch_size": (1, 1024), "mlp_ratio": (0.01, 64.0), "ls_init_value": (0.0, 64.0),
    },
    "text_cfg": {
        "context_length": (1, 4096), "vocab_size": (1, 1_000_000), "width": (1, 16_384), "heads": (1, 256),
        "layers": (1, 256), "mlp_ratio": (0.01, 64.0), "ls_init_value": (0.0, 64.0),
    },
}  # fmt: skip

#: The published architecture, so that open_clip need not be asked, as of its configuration files.
VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}


@dataclass(frozen=True)
class ClipConfig:
    """Which CLIP: an open_clip architecture by name, or an open_clip model configuration.

    ``layer`` is the block whose output the text encoder returns: the published one is ``penultimate``.
    """

    arch: str = "ViT-H-14"
    model_cfg: dict[str, Any] | None = None
    layer: str = "penultimate"

    def __post_init__(self):
        if self.layer not in LAYER_CHOICES:
            allowed = ", ".join(LAYER_CHOICES)
            raise ConfigurationError(
                f"embedder: layer: got {describe(self.layer)}, allowed is one of {allowed}"
            )
        if not isinstance(self.arch, str):
            raise ConfigurationError(f"embedder: arch: got {describe(self.arch)}, allowed is a text")
        _check_clip(self.architecture, self.arch)

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The open_clip model configuration."""
        if self.model_cfg is not None:
            return self.model_cfg
        return VIT_H_14 if self.arch == "ViT-H-14" else _listed_architecture(self.arch)

    @property
    def embed_dim(self) -> int:
        """Size of the image embedding."""
        return self.architecture["embed_dim"]

    @property
    def image_size(self) -> int:
        """Side of the visual tower's square input, in pixels."""
        return self.architecture["vision_cfg"].get("image_size", 224)

    @property
    def text_width(self) -> int:
        """Size of the text tower's hidden states."""
        return self.architecture["text_cfg"].get("width", 512)


def _listed_architecture(arch: str) -> dict[str, Any]:
    import open_clip  # takes seconds, and is needed for other architectures than the published one only

    # open_clip would also take names that send it to the network, or to other folders.
    is_listed = arch.replace("/", "-") in open_clip.list_models()
    architecture = open_clip.get_model_config(arch) if is_listed else None
    if architecture is None:
        raise ConfigurationError(
            f"embedder: arch: open_clip {open_clip.__version__} has no architecture {arch!r}; "
            "open_clip.list_models() lists those it has"
        )
    return architecture


def _check_clip(architecture: dict[str, Any], arch: str) -> None:
    needed = {"embed_dim", *CLIP_KEYS}
    if (
        not isinstance(architecture, dict)
        or not needed <= architecture.keys()
        or not all(isinstance(architecture[name], dict) for name in CLIP_KEYS)
    ):
        raise ConfigurationError(
            f"embedder: model_cfg: an object with {', '.join(sorted(needed))} is needed, "
            f"got {describe(architecture)}"
        )
    if architecture.get("custom_text") or "hf_model_name" in architecture["text_cfg"]:
        raise ConfigurationError(
            f"embedder: arch {arch!r} has no CLIP text transformer of its own, which stage two needs"
        )
    _check_numbers("embedder: model_cfg: embed_dim", architecture["embed_dim"], (1, 16_384), False)
    for section, bounds in CLIP_KEYS.items():
        for name, value in architecture[section].items():
            key = f"embedder: model_cfg: {section}: {name}"
            if name not in bounds:
                raise ConfigurationError(f"{key} is not allowed; allowed are {', '.join(bounds)}")
            is_list = name == "layers" and isinstance(value, list)  # a ResNet's, for each of its stages
            _check_numbers(key, value, bounds[name], is_list)
