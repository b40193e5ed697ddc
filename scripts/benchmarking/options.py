"""What is asked for on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from modelscope_i2v.engine.precision import precision_name, select_dtype

from .sizes import PUBLISHED_STEPS, Size

#: The kinds of rows that both sides have, in the table's order.
STOCK_KINDS = ("step", "encode", "decode", "stage", "loading", "memory")
#: Ours beside ours.
OWN_KINDS = ("precision", "approximate")
#: Ours alone.
LENGTH = "length"
KINDS = (*STOCK_KINDS, *OWN_KINDS, LENGTH)
#: Without what takes several videos with all their steps, or long ones.
DEFAULT_KINDS = (*STOCK_KINDS, "precision")


@dataclass(frozen=True)
class Options:
    """What is measured, where and how. ``steps`` None is each row's own number."""

    size: Size
    device: torch.device
    precision: str
    repeats: int
    kinds: tuple[str, ...]
    folder: Path
    profile: bool = False
    compile: bool = False
    steps: int | None = None

    def whole_steps(self, stage: int) -> int:
        """The steps of a whole stage that is measured once on each side."""
        return self.steps or self.size.steps[stage]

    def exact_steps(self, stage: int) -> int:
        """The steps of the exact mode, beside which approximate ones are measured."""
        return self.steps or PUBLISHED_STEPS[stage]

    @property
    def length_steps(self) -> int:
        """The steps of the videos of several lengths."""
        return self.steps or 2

    @property
    def our_precision(self) -> str:
        """What ours computes in: what ``auto`` comes to here."""
        return precision_name(select_dtype(self.precision, self.device))
