"""Which floating-point type a device computes in."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ..weights.loading import PRECISIONS

#: What a processor that multiplies bfloat16 says of itself; others convert, and are slower than in fp32.
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


def select_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type for one of ``auto``, ``fp32``, ``fp16``, ``bf16``.

    ``auto`` is float16 on CUDA, bfloat16 on a CPU that has it in hardware, and float32 elsewhere.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


@functools.lru_cache(maxsize=None)
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AMX or AVX512-BF16)."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in _BF16_INSTRUCTIONS)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    return any(name in flags for name in _BF16_INSTRUCTIONS)
