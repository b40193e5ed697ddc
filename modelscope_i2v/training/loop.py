"""One training loop for every network: a generator that yields its state after each step.

What to do with a state (log it, draw it, stop) is the caller's. All randomness of a run comes from the one
generator that is handed to the loss, and a checkpoint holds its state: a run that was interrupted and
resumed ends with the same weights as one that was not, to the bit on a CPU.
"""

from __future__ import annotations

import copy
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, ContextManager, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, MissingPackageError, NumericalError
from ..media.files import atomic_file

#: The loss of a batch of a step (counted from 0), and figures to log; all randomness is the generator's.
Loss = Callable[[torch.Generator, int], "tuple[Tensor, Mapping[str, float]]"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate: a linear rise over ``warmup`` steps, then a fall to ``floor`` of it.

    ``shape`` is that of the fall: half a cosine, a line (``linear``), or none (``constant``).
    """

    steps: int
    rate: float
    warmup: int = 100
    floor: float = 0.02
    shape: str = "cosine"

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        progress = min(step / self.steps, 1.0)
        fall = {"cosine": 0.5 + 0.5 * math.cos(math.pi * progress), "linear": 1 - progress, "constant": 1.0}
        return self.rate * rise * (self.floor + (1 - self.floor) * fall[self.shape])


@dataclass
class Training:
    """All that a run changes: weights, their running average, the optimizer, the random state, the step.

    Args:
        network: what is trained; parameters that need no gradient are left out.
        schedule: the rate by step.
        seed: of the generator that the loss draws from.
        rate_factors: by the beginning of a parameter's name, what its rate is multiplied with.
        average_decay: of the running average; early steps average over fewer. 0: there is no average.
        optimizer: ``adamw``, or ``adamw8bit`` of bitsandbytes.
        accumulate: losses whose mean gives the gradient of a step.
        scaled: whether losses are scaled while gradients are computed, as float16 needs it.
        no_sync: entered for all of a step's losses but the last, where processes share gradients.
    """

    network: nn.Module
    schedule: Schedule
    seed: int = 0
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    average_decay: float = 0.999
    weight_decay: float = 1e-3
    clip: float = 1.0
    step: int = 0
    optimizer_name: str = "adamw"
    accumulate: int = 1
    scaled: bool = False
    no_sync: Callable[[], ContextManager] = nullcontext

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        self.average = None
        if self.average_decay:
            self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                key = self._rate_factor(name), parameter.ndim > 1
                groups.setdefault(key, []).append(parameter)
        self.optimizer = optimizer_class(self.optimizer_name)(
            [
                {"params": parameters, "factor": factor, "weight_decay": self.weight_decay * decays}
                for (factor, decays), parameters in groups.items()
            ],
            betas=(0.9, 0.99),
        )
        device = next(self.network.parameters()).device.type
        self.scaler = _gradient_scaler(device, self.scaled)

    def _rate_factor(self, name: str) -> float:
        return next((factor for start, factor in self.rate_factors.items() if name.startswith(start)), 1.0)

    def accumulate_gradients(self, loss_of: Loss) -> tuple[float, Mapping[str, float]]:
        """Add the gradients of a step's losses; returns the losses' mean, and the last one's figures.

        Raises:
            NumericalError: if a loss is not finite.
        """
        mean = 0.0
        figures: Mapping[str, float] = {}
        for number in range(self.accumulate):
            last = number == self.accumulate - 1
            with nullcontext() if last else self.no_sync():
                loss, figures = loss_of(self.generator, self.step)
                if not torch.isfinite(loss):
                    raise NumericalError(
                        f"the loss of step {self.step} is {loss.item()}: lower the learning rate, "
                        "or look at the data"
                    )
                self.scaler.scale(loss / self.accumulate).backward()
            mean += loss.item() / self.accumulate
        return mean, figures

    def update(self) -> float:
        """Take one step down the gradients, and clear them; returns their norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step) * group["factor"]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_([p for p in self.network.parameters() if p.requires_grad], self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self._update_average()
        return norm.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        weight = 1 - min(self.average_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.parameters(), self.network.parameters()):
            mean.lerp_(value, weight)

    def save(self, path: str | os.PathLike, **more: Any) -> None:
        """Write a checkpoint, with ``more`` entries. What is there is replaced once the new one is whole.

        Raises:
            OutputError: if it cannot be written.
        """
        state = {
            "step": self.step,
            "network": self._trained(self.network.state_dict()),
            "average": None if self.average is None else self._trained(self.average.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            **more,
        }
        with atomic_file(path) as temporary:
            torch.save(state, temporary)

    def load(
        self, path: str | os.PathLike, check: Callable[[dict[str, Any]], None] = lambda state: None
    ) -> dict[str, Any]:
        """Continue from a checkpoint of a run with the same network; returns all that it holds.

        ``check`` is called with that before anything is changed, and may raise.

        Raises:
            CheckpointError: if it cannot be read.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            weights = {name: state[name] for name in ("network", "average")}
        except Exception as error:  # of many types: what is no pickle is read as one
            raise CheckpointError(f"'{path}' is damaged, or no checkpoint of training: {error}") from error
        check(state)
        for network, name in ((self.network, "network"), (self.average, "average")):
            if network is not None:  # frozen parameters are not in the checkpoint
                network.load_state_dict({**network.state_dict(), **weights[name]})
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        return state

    def _trained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        frozen = {name for name, value in self.network.named_parameters() if not value.requires_grad}
        return {name: value for name, value in state.items() if name not in frozen}


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of ``adamw`` or ``adamw8bit``.

    Raises:
        MissingPackageError: if its package is not installed or does not work here.
    """
    if name == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as error:  # RuntimeError: its library does not load here
        raise MissingPackageError(
            f"optimizer {name!r} needs the package bitsandbytes, which cannot be used here ({error}): "
            "pip install bitsandbytes"
        ) from error
    return AdamW8bit


def _gradient_scaler(device: str, enabled: bool) -> Any:
    scaler = getattr(torch.amp, "GradScaler", None)  # since torch 2.3
    if scaler is None:
        return torch.cuda.amp.GradScaler(enabled=enabled)
    return scaler(device, enabled=enabled)


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
        NumericalError: if a loss is not finite; the weights are those of the step before.
    """
    while training.step < training.schedule.steps:
        loss, figures = training.accumulate_gradients(loss_of)
        rate = training.schedule.at(training.step)
        gradient = training.update()
        yield StepState(training.step, loss, rate, gradient, figures)
