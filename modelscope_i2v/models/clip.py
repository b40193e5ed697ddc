"""The two towers of open_clip's ViT-H-14, each on its own: a stage needs only one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import open_clip
import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, InvalidInputError

LAYER_CHOICES = ("penultimate", "last")


@dataclass(frozen=True)
class ClipConfig:
    """Which CLIP: an open_clip architecture by name, or an open_clip model configuration.

    ``layer`` is the block whose output the text encoder returns: the published one is ``penultimate``.
    """

    arch: str = "ViT-H-14"
    model_cfg: dict[str, Any] | None = field(default=None)
    layer: str = "penultimate"

    def __post_init__(self):
        if self.layer not in LAYER_CHOICES:
            raise ConfigurationError(
                f"embedder: layer: got {self.layer!r}, allowed are {', '.join(LAYER_CHOICES)}"
            )
        self._checked_architecture()

    def _checked_architecture(self) -> dict[str, Any]:
        if self.model_cfg is None:
            # open_clip would also take names that send it to the network, or to other folders.
            is_listed = self.arch.replace("/", "-") in open_clip.list_models()
            architecture = open_clip.get_model_config(self.arch) if is_listed else None
            if architecture is None:
                raise ConfigurationError(
                    f"embedder: arch: open_clip {open_clip.__version__} has no architecture {self.arch!r}; "
                    "open_clip.list_models() lists those it has"
                )
        else:
            architecture = self.model_cfg
        needed = {"embed_dim", "vision_cfg", "text_cfg"}
        if (
            not isinstance(architecture, dict)
            or not needed <= architecture.keys()
            or not all(isinstance(architecture[name], dict) for name in ("vision_cfg", "text_cfg"))
        ):
            raise ConfigurationError(
                f"embedder: model_cfg: an object with {', '.join(sorted(needed))} is needed, "
                f"got {str(architecture)[:100]}"
            )
        if architecture.get("custom_text") or "hf_model_name" in architecture["text_cfg"]:
            raise ConfigurationError(
                f"embedder: arch {self.arch!r} has no CLIP text transformer of its own, which stage two needs"
            )
        return architecture

    def build(self) -> open_clip.CLIP:
        """The whole CLIP, with parameters that hold nothing yet (on the meta device)."""
        architecture = self._checked_architecture()
        arguments = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
        known = {name: architecture[name] for name in arguments if name in architecture}
        try:
            with torch.device("meta"):
                return open_clip.CLIP(**known)
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
            raise ConfigurationError(f"embedder: open_clip cannot build this model: {error}") from error

    @property
    def embed_dim(self) -> int:
        """Size of the image embedding."""
        return self._checked_architecture()["embed_dim"]

    @property
    def image_size(self) -> int:
        """Side of the visual tower's square input, in pixels."""
        return self._checked_architecture()["vision_cfg"].get("image_size", 224)

    @property
    def text_width(self) -> int:
        """Size of the text tower's hidden states."""
        return self._checked_architecture()["text_cfg"].get("width", 512)


class _ClipTower(nn.Module):
    """One tower of a CLIP as ``model``, whose parameters keep the full checkpoint's names."""

    #: Members of the full model that this tower does without.
    unused: tuple[str, ...] = ()

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.model = config.build()
        #: The parameters' names in a full checkpoint, of both towers.
        self.full_model_keys = frozenset(self.model.state_dict())
        for name in self.unused:
            delattr(self.model, name)

    @property
    def device(self) -> torch.device:
        """Where the tower's parameters are; assigning moves them."""
        return next(self.parameters()).device

    @device.setter
    def device(self, device: torch.device | str) -> None:
        self.to(device)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class ClipImageEncoder(_ClipTower):
    """The visual tower: projected embedding, not normalised."""

    unused = (
        "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection",
        "logit_scale", "attn_mask",
    )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """Embeddings [B, embed_dim], float32, of normalised images [B, 3, 224, 224]."""
        size = self.config.image_size
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, size, size):
            raise InvalidInputError(f"CLIP: images must be [B, 3, {size}, {size}], got {list(image.shape)}")
        return self.model.visual(image.to(self.device, self.dtype)).float()


class ClipTextEncoder(_ClipTower):
    """The text tower: hidden states after all blocks but the last, and the final LayerNorm."""

    unused = ("visual", "text_projection", "logit_scale", "attn_mask")

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, context_length] of texts; what is longer than the context is cut off."""
        return open_clip.tokenize(list(texts), context_length=self.model.context_length)

    def forward(self, texts: str | Sequence[str]) -> Tensor:
        """Hidden states [B, context_length, width], float32, of one text or several."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidInputError(f"CLIP: a text or a list of texts is needed, got {texts!r}")
        tokens = self.tokenize(texts).to(self.device)
        model = self.model
        x = model.token_embedding(tokens).to(self.dtype) + model.positional_embedding.to(self.dtype)
        length = x.shape[1]
        causal_mask = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu_(1)
        # Since open_clip 2.25 its blocks take (batch, token, width); before, (token, batch, width).
        batch_first = getattr(model.transformer, "batch_first", False)
        x = x if batch_first else x.transpose(0, 1)
        blocks = model.transformer.resblocks
        for block in blocks if self.config.layer == "last" else blocks[:-1]:
            x = block(x, attn_mask=causal_mask)
        x = x if batch_first else x.transpose(0, 1)
        return model.ln_final(x).float()
