"""One training loop for every network: a generator that yields its state after each step.

What to do with a state (log it, draw it, stop) is the caller's. All randomness of a run comes from the one
generator that is handed to the loss, and a checkpoint holds its state: a run that was interrupted and
resumed ends with the same weights as one that was not, to the bit on a CPU.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

#: The loss of a step (counted from 0), and figures to log; all randomness is drawn from the generator.
Loss = Callable[[torch.Generator, int], "tuple[Tensor, Mapping[str, float]]"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate: a linear rise over ``warmup`` steps, then half a cosine down to ``floor`` of it."""

    steps: int
    rate: float
    warmup: int = 100
    floor: float = 0.02

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = 0.5 + 0.5 * math.cos(math.pi * min(step / self.steps, 1.0))
        return self.rate * rise * (self.floor + (1 - self.floor) * fall)


@dataclass
class Training:
    """All that a run changes: weights, their running average, the optimizer, the random state, the step.

    Args:
        network: what is trained; parameters that need no gradient are left out.
        schedule: the rate by step.
        seed: of the generator that the loss draws from.
        rate_factors: by the beginning of a parameter's name, what its rate is multiplied with.
        average_decay: of the running average; early steps average over fewer.
    """

    network: nn.Module
    schedule: Schedule
    seed: int = 0
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    average_decay: float = 0.999
    weight_decay: float = 1e-3
    clip: float = 1.0
    step: int = 0

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                key = self._rate_factor(name), parameter.ndim > 1
                groups.setdefault(key, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "factor": factor, "weight_decay": self.weight_decay * decays}
                for (factor, decays), parameters in groups.items()
            ],
            betas=(0.9, 0.99),
        )

    def _rate_factor(self, name: str) -> float:
        return next((factor for start, factor in self.rate_factors.items() if name.startswith(start)), 1.0)

    def update(self, loss: Tensor) -> float:
        """Take one step down a loss; returns the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step) * group["factor"]
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in self.network.parameters() if p.requires_grad], self.clip)
        self.optimizer.step()
        self.step += 1
        self._update_average()
        return norm.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        weight = 1 - min(self.average_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.parameters(), self.network.parameters()):
            mean.lerp_(value, weight)

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint. A file that is there is replaced once the new one is whole."""
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: str | os.PathLike) -> None:
        """Continue from a checkpoint of a run with the same network."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]


@dataclass(frozen=True)
class StepState:
    """What a step came to: ``figures`` are those of the loss, ``gradient`` is its norm before clipping."""

    step: int
    loss: float
    rate: float
    gradient: float
    figures: Mapping[str, float]


def train(training: Training, loss_of: Loss) -> Iterator[StepState]:
    """Train from where ``training`` stands to the end of its schedule.

    Raises:
        FloatingPointError: if a loss is not finite; the weights are those of the step before.
    """
    while training.step < training.schedule.steps:
        loss, figures = loss_of(training.generator, training.step)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {training.step} is {loss.item()}: lower the learning rate, "
                "or look at the data"
            )
        rate = training.schedule.at(training.step)
        gradient = training.update(loss)
        yield StepState(training.step, loss.item(), rate, gradient, figures)
