"""The two towers of open_clip's ViT-H-14, each on its own: a stage needs only one of them."""

from __future__ import annotations

from typing import Sequence

import open_clip
import torch
from open_clip.tokenizer import basic_clean, whitespace_clean
from torch import Tensor, nn

from ..errors import ConfigurationError, InvalidInputError
from .config import ClipConfig

#: No token stands for more than 32 characters. Texts that are twice as long as the context can show are cut
#: before they are tokenized, which would take a minute for a word of 60,000 letters.
CHARACTERS_PER_TOKEN = 64


def build_clip(config: ClipConfig) -> open_clip.CLIP:
    """Return the whole CLIP, with parameters that hold nothing yet (on the meta device)."""
    names = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    arguments = {name: config.architecture[name] for name in names if name in config.architecture}
    try:
        with torch.device("meta"):
            return open_clip.CLIP(**arguments)
    except (TypeError, ValueError, KeyError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise ConfigurationError(f"embedder: open_clip cannot build this model: {error}") from error


class _ClipTower(nn.Module):
    """One tower of a CLIP as ``model``, whose parameters keep the full checkpoint's names."""

    #: Members of the full model that this tower does without.
    unused: tuple[str, ...] = ()

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.model = build_clip(config)
        #: The parameters' names in a full checkpoint, of both towers.
        self.full_model_keys = frozenset(self.model.state_dict())
        for name in self.unused:
            delattr(self.model, name)

    @property
    def device(self) -> torch.device:
        """The device of the tower's parameters; assigning moves them."""
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
        """Return token ids [B, context_length]; what is longer than the context is cut off."""
        length = self.model.context_length
        limit = CHARACTERS_PER_TOKEN * length
        bounded = [
            text if len(text) <= limit else whitespace_clean(basic_clean(text))[:limit] for text in texts
        ]
        return open_clip.tokenize(bounded, context_length=length)

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
