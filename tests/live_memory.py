"""How much memory a computation holds at its peak, on a device that computes nothing; and less to have."""

from __future__ import annotations

import resource
import weakref
from contextlib import contextmanager
from typing import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveMemory(TorchDispatchMode):
    """``peak``: the most bytes that were held at once by what was computed in the block, weights left out."""

    def __init__(self, *networks: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for network in networks:
            self._seen.update({each.untyped_storage(): True for each in network.parameters()})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


class TrainedFlashAttention(torch.autograd.Function):
    """What a fused attention keeps of memory for the gradient."""

    @staticmethod
    def forward(context, q, k, v):
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        context.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(context, gradient):
        return tuple(torch.empty_like(each) for each in context.saved_tensors[:3])


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a fused attention takes of memory: its result. The meta device would write out all scores."""
    return torch.empty_like(q)


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Let this process take ``size`` bytes more of addresses than it has, and no more."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
