"""The UNet's repeated blocks, compiled by torch.compile (https://pytorch.org/docs/stable/torch.compiler.html).

Only the blocks that repeat: they share their code, so it takes seconds where the whole network takes minutes.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from .errors import MissingPackageError
from .models.transformers import TransformerBlock
from .models.unet import UNet
from .samplers.velocity import Velocity

logger = logging.getLogger(__name__)

#: A block is compiled once for each width and number of tokens that it meets; torch's own limit is 8.
_VARIANTS = 64


class CompiledBlocks:
    """A UNet whose transformer blocks are compiled, when they are first called with a size.

    What is fused there is all that is not a matrix product: norms, GEGLU, residuals.
    """

    def __init__(self, unet: UNet):
        self._sizes: set[tuple[int, ...]] = set()
        blocks = [block for block in unet.modules() if isinstance(block, TransformerBlock)]
        for block in blocks:
            block.self_attend = torch.compile(block.self_attend, dynamic=False)
            block.attend_context = torch.compile(block.attend_context, dynamic=False)
        self._count = len(blocks)

    def prepare(self, velocity: Velocity, x: Tensor) -> None:
        """Compile for states of x's size, by one call whose result is not used.

        Raises:
            MissingPackageError: if torch.compile does not work here.
        """
        if tuple(x.shape) in self._sizes:
            return
        start = time.perf_counter()
        try:
            with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
                velocity(x, 999)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise MissingPackageError(
                f"compile: torch.compile does not work here: {reason}. It needs a C++ compiler on a CPU and "
                "Triton on a GPU; set compile to false"
            ) from error
        self._sizes.add(tuple(x.shape))
        took = time.perf_counter() - start
        logger.info("compiled %d blocks for latents %s in %.1f s", self._count, list(x.shape), took)
