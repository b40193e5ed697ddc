"""One video spread over processes: each computes a share of every step, and all get the whole.

The processes make the same call (``torchrun`` starts them) and draw the same noise. What is independent
within a step goes to different ones: windows of a long video, the two branches of guidance of a short one,
and frames when they are decoded. All else is little, and each does it for itself.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, distributed

from ..errors import InvalidInputError


class Spread:
    """The processes that share a video; alone, this one does everything.

    Attributes:
        rank, count: which process of how many.
    """

    rank, count = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def parts(self, part: Callable[[int], Tensor], starts: Sequence[int]) -> Iterable[Tensor]:
        """Yield the parts of a video, of one shape, in order."""
        return map(part, starts)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which are of one shape, by rank."""
        return [mine]

    def frames(self, decode: Callable[[int, int], Tensor], count: int, axis: int) -> Tensor:
        """Return ``count`` frames, of which ``decode`` gives those from one to another, along an axis."""
        return decode(0, count)

    def same(self, value: Any) -> Any:
        """Return the first process's value."""
        return value

    def check_same(self, name: str, *values: Any) -> None:
        """Refuse processes that disagree.

        Raises:
            InvalidInputError: in all of them.
        """


class _Joined(Spread):
    """Processes of ``torch.distributed``'s default group."""

    def __init__(self) -> None:
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def parts(self, part: Callable[[int], Tensor], starts: Sequence[int]) -> Iterator[Tensor]:
        for first in range(0, len(starts), self.count):
            turn = starts[first : first + self.count]
            # Where there is nothing left for a process, it does another's, for a tensor of the shape.
            yield from self.gather(part(turn[self.rank % len(turn)]))[: len(turn)]

    def gather(self, mine: Tensor) -> list[Tensor]:
        mine = mine.contiguous()
        gathered = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(gathered, mine)
        return gathered

    def frames(self, decode: Callable[[int, int], Tensor], count: int, axis: int) -> Tensor:
        share = -(-count // self.count)  # of one size for all: the last one's may overlap the one before
        starts = [min(rank * share, count - share) for rank in range(self.count)]
        parts = self.gather(decode(starts[self.rank], starts[self.rank] + share))
        shape = list(parts[0].shape)
        shape[axis] = count
        whole = parts[0].new_empty(shape)
        for start, part in zip(starts, parts):
            whole.narrow(axis, start, share).copy_(part)
        return whole

    def same(self, value: Any) -> Any:
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def check_same(self, name: str, *values: Any) -> None:
        firsts = self.same(values)
        agreed: list[bool] = [True] * self.count
        distributed.all_gather_object(agreed, all(map(_alike, values, firsts)))
        if not all(agreed):
            others = [str(rank) for rank, each in enumerate(agreed) if not each]
            raise InvalidInputError(
                f"{name}: the processes do not make the same video: process {', '.join(others)} was given "
                "another input or other keywords than process 0"
            )


def _alike(value: Any, first: Any) -> bool:
    """Whether two values are equal, tensors but for the rounding of different devices."""
    if isinstance(value, Tensor):
        return value.shape == first.shape and torch.allclose(value, first, rtol=1e-2, atol=1e-2)
    return value == first


@contextmanager
def joined_processes() -> Iterator[Spread]:
    """Join the processes that ``torchrun`` started, for a block; alone where it started none."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        yield Spread()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield _Joined()
    finally:
        distributed.destroy_process_group()
