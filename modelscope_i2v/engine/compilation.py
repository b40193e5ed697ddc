"""The UNet's repeated blocks, compiled by torch.compile (https://pytorch.org/docs/stable/torch.compiler.html).

Only the blocks that repeat: they share their code, so it takes seconds where the whole network takes minutes.
"""

from __future__ import annotations

import logging
import time
from typing import Sequence

import torch
from torch import Tensor

from ..errors import MissingPackageError
from ..models.transformers import TransformerBlock
from ..models.unet import UNet
from ..samplers.schedules import Denoiser, NoiseLevel

logger = logging.getLogger(__name__)

#: A block is compiled once for each width and number of tokens that it meets; torch's own limit is 8.
_VARIANTS = 64


class CompiledBlocks:
    """A UNet whose transformer blocks are compiled, when they are first called with a size.

    What is fused there is all that is not a matrix product: norms, GEGLU, residuals.

    Args:
        unet: is changed; its parameters keep their names.
        backend: of torch.compile.

    Raises:
        MissingPackageError: if there is no torch.compile for this Python.
    """

    def __init__(self, unet: UNet, backend: str = "inductor"):
        self._done: set[tuple[int, ...]] = set()
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        # For the whole process, as torch has it: where it is passed, blocks silently run as they are.
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), _VARIANTS))
        blocks = [block for block in unet.modules() if isinstance(block, TransformerBlock)]
        self._count = len(blocks)
        try:
            for block in blocks:
                compiled = torch.compile(block.forward, dynamic=False, backend=backend)
                setattr(block, "forward", compiled)  # noqa: B010 - a method, to a type checker
        except RuntimeError as error:
            raise _refusal(error) from error

    def prepare(self, denoisers: Sequence[Denoiser], x: Tensor, level: NoiseLevel) -> None:
        """Compile for states of x's size, by one call of each denoiser whose result is not used.

        Raises:
            MissingPackageError: if torch.compile does not work here.
        """
        size = (len(denoisers), *x.shape)
        if size in self._done:
            return
        start = time.perf_counter()
        try:
            for denoise in denoisers:
                denoise(x, level)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _refusal(error) from error
        self._done.add(size)
        took = time.perf_counter() - start
        logger.info("compiled %d blocks for latents %s in %.1f s", self._count, list(x.shape), took)


def _refusal(error: Exception) -> MissingPackageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MissingPackageError(
        f"compile: torch.compile does not work here: {reason}. It needs a C++ compiler on a CPU, Triton on a "
        "GPU, and a Python that torch supports; or set compile to false"
    )
