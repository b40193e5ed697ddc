"""The UNet's transformers: over the pixels of each frame, and over the frames of each pixel.

Frames do not meet in the one, nor pixels in the other. So each goes through its input in groups of as many
as the call's ``chunk`` allows, which bounds the memory of its feed-forward, and changes no number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import AttentionFunction
from .conditioning import Conditioning, chunks, in_frame_groups, repeat_to
from .layers import GroupNorm, LayerNorm, PointwiseConv

#: The largest tensor inside a transformer, GEGLU's projection, has this many times its input's elements.
EXPANSION = 8


class Attention(nn.Module):
    """Multi-head attention from tokens [.., N, width] to a context, or to themselves."""

    def __init__(self, width: int, context_dim: int, heads: int, attend: AttentionFunction):
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from tokens [B f, N, width] to a context [B, M, context_dim] of f frames each."""
        context = x if context is None else context
        q, k, v = (
            self._split_heads(tokens) for tokens in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        # One context serves all frames of a video: (b f) n -> b (f n) puts their queries side by side.
        attended = self._attend(q.reshape(len(k), -1, *q.shape[2:]), k, v)
        return self.to_out(attended.reshape(q.shape).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class AttentionOverFrames(Attention):
    """Self-attention of tokens [F, P, width] over F, at each of P pixels, by strides instead of copies."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))  # f p heads d -> p f heads d
        return self.attend(q, k, v).transpose(0, 1)


class GEGLU(nn.Module):
    """Gated linear unit with the exact GELU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(in_width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(width, 4 * width),
            nn.Identity(),  # a dropout's place
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context (to itself where there is none), feed-forward."""

    def __init__(
        self,
        width: int,
        heads: int,
        attend: AttentionFunction,
        context_dim: int | None = None,
        attention: type[Attention] = Attention,
    ):
        super().__init__()
        self.attn1 = attention(width, width, heads, attend)
        self.ff = FeedForward(width)
        self.attn2 = attention(width, context_dim or width, heads, attend)
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of each frame, attending to the context.

    (b f) c h w in and out; where there are k contexts for each sample of its input, k times as many out.
    """

    def __init__(
        self, width: int, heads: int, context_dim: int, attend: AttentionFunction, num_groups: int = 32
    ):
        super().__init__()
        self.norm = GroupNorm(width, 1e-6, num_groups)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, attend, context_dim)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        context = conditioning.context
        x = repeat_to(x, len(context) * conditioning.frames)

        def transform(frames: slice, samples: slice) -> Tensor:
            return self._transform(x[frames], context[samples])

        return in_frame_groups(transform, x, conditioning, EXPANSION)

    def _transform(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        tokens = self.transformer_blocks[0](tokens.to(x.dtype), context).to(tokens.dtype)
        return x + rearrange(self.proj_out(tokens), "n (h w) c -> n c h w", h=x.shape[2])


class TemporalTransformer(nn.Module):
    """A transformer over the frames of each pixel. (b f) c h w in and out."""

    def __init__(
        self, width: int, heads: int, head_dim: int, attend: AttentionFunction, num_groups: int = 32
    ):
        super().__init__()
        inner = heads * head_dim
        self.expansion = -(-EXPANSION * inner // width)
        # Its GroupNorm, like those of the temporal convolutions, takes its statistics over f, h and w.
        self.norm = GroupNorm(width, 1e-6, num_groups)
        self.proj_in = PointwiseConv(width, inner)
        block = TransformerBlock(inner, heads, attend, attention=AttentionOverFrames)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = PointwiseConv(inner, width)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        frames, chunk = conditioning.frames, conditioning.chunk
        normed = self.norm(rearrange(x, "(b f) c h w -> b c f (h w)", f=frames))
        normed = rearrange(normed, "b c f p -> b f p c")
        video = rearrange(x, "(b f) c h w -> b f (h w) c", f=frames)
        result = torch.empty_like(video)
        elements = frames * x.shape[1] * self.expansion
        for sample in range(len(video)):
            for pixels in chunks(video.shape[2], elements, chunk):
                tokens = self._attend(normed[sample, :, pixels], x.dtype)
                result[sample, :, pixels] = video[sample, :, pixels] + tokens
        return rearrange(result, "b f (h w) c -> (b f) c h w", h=x.shape[2])

    def _attend(self, tokens: Tensor, stream: torch.dtype) -> Tensor:
        """Return what some pixels' frames, f p c, are changed by."""
        tokens = self.proj_in(tokens)
        return self.proj_out(self.transformer_blocks[0](tokens.to(stream)).to(tokens.dtype))
