"""Training in one process, or in several that ``accelerate launch`` started, one for each GPU."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any, Callable, ContextManager

import torch
from torch import nn

from ..errors import MissingPackageError


class Processes:
    """This process among those that train together; alone, it waits for nobody.

    Attributes:
        rank, count: which of how many.
        device: of this process, where there are several; else None.
    """

    rank, count = 0, 1
    device: torch.device | None = None

    def wait(self) -> None:
        """Wait until all have come here."""

    def shared(self, network: nn.Module) -> tuple[Callable[..., Any], Callable[[], ContextManager]]:
        """Return how a network is called so that all get the mean of the gradients.

        With it comes a context in which gradients stay each process's own.
        """
        return network, nullcontext

    def own(self, generator: torch.Generator) -> torch.Generator:
        """Return the generator of this process's draws; ``generator`` stays in one state for all."""
        if self.count == 1:
            return generator
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.Generator().manual_seed(seed + self.rank)


class _Accelerated(Processes):
    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def shared(self, network: nn.Module) -> tuple[Callable[..., Any], Callable[[], ContextManager]]:
        wrapped = self._accelerator.prepare_model(network)
        return wrapped, lambda: self._accelerator.no_sync(wrapped)


def join_processes() -> Processes:
    """Return this process among those that its environment tells of.

    Raises:
        MissingPackageError: if there are several and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return Processes()
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingPackageError(
            "training in several processes needs the accelerate package: pip install 'modelscope_i2v[train]'"
        ) from error
    return _Accelerated(Accelerator())
