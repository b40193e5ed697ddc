"""Attention behind one function: softmax(q k^T / sqrt(d)) v, computed by the library that was chosen."""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Callable, ContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError, MissingPackageError
from .config import ATTENTION_CHOICES

#: q [B, N, heads, head_dim], k and v [B, M, heads, head_dim] -> [B, N, heads, head_dim]
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

#: From this length on cuDNN's attention is the fastest on Hopper GPUs, at head sizes up to 128.
_LONG = 1024


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        q: queries, [B, N, heads, head_dim].
        k, v: keys and values, [B, M, heads, head_dim].

    Returns:
        [B, N, heads, head_dim].
    """
    # Kept four-dimensional: batch x heads in one grid dimension would pass CUDA's limit of 65,535.
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # b n heads d -> b heads n d
    long = min(q.shape[2], k.shape[2]) >= _LONG and q.shape[3] <= 128 and q.element_size() == 2
    with _cudnn_first() if long and q.is_cuda and _prefers_cudnn(q.device) else nullcontext():
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn_first() -> ContextManager:
    """Torch's kernels in another order than its own; it can be told one since 2.6."""
    from torch.nn import attention

    kernels = attention.SDPBackend
    order = [kernels.CUDNN_ATTENTION, kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH]
    return attention.sdpa_kernel(order, set_priority=True)


@functools.lru_cache(maxsize=None)
def _prefers_cudnn(device: torch.device) -> bool:
    """Whether a GPU is a Hopper or later, and torch can be told the order."""
    try:
        from torch.nn.attention import sdpa_kernel
    except ImportError:
        return False
    if "set_priority" not in inspect.signature(sdpa_kernel).parameters:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def select_attention(choice: str, device: torch.device | str = "cpu") -> AttentionFunction:
    """The attention function for one of ``ATTENTION_CHOICES``.

    ``auto`` is SDPA, which needs nothing installed and chooses among its own kernels. ``xformers`` is
    used only where it was asked for, and tried on ``device`` at once, because an installed xformers
    whose extensions do not fit the installed torch fails only when it is called.

    Raises:
        ConfigurationError: for an unknown choice.
        MissingPackageError: if xformers was asked for and is not installed, or does not run here.
    """
    if choice in ("auto", "sdpa"):
        return sdpa_attention
    if choice != "xformers":
        raise ConfigurationError(f"attention: got {choice!r}, allowed are {', '.join(ATTENTION_CHOICES)}")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise MissingPackageError(
            f"attention 'xformers' needs the xformers package, which cannot be imported ({error}). "
            "Install it with: pip install 'modelscope_i2v[xformers]', or set attention to 'auto'."
        ) from error
    probe = torch.zeros(1, 8, 1, 16, device=device)
    try:
        memory_efficient_attention(probe, probe, probe)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise MissingPackageError(
            f"attention 'xformers' is installed but does not run on {device}: "
            f"{str(error).splitlines()[0]} Set attention to 'auto'."
        ) from error
    return memory_efficient_attention
