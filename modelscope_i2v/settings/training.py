"""The settings of training, each declared once: flags, keywords and the document's table are made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Mapping

from ..errors import ConfigurationError
from .rules import Rule, boolean, choice, did_you_mean, integer, number, optional, size
from .stages import IMAGE_TO_VIDEO, PRECISION_CHOICES, SETTINGS_OF_STAGE, Setting, StageSettings

OPTIMIZERS = ("adamw", "adamw8bit")
RATE_SCHEDULES = ("cosine", "linear", "constant")


def _setting(default: Any, rule: Rule, help: str) -> Any:
    return field(default=default, metadata={"setting": Setting(rule, help)})


@dataclass(frozen=True)
class TrainingSettings:
    """What a training run does; all values are checked.

    Raises:
        ConfigurationError: naming the setting, the value and what is allowed.
    """

    stage: str = _setting(IMAGE_TO_VIDEO, choice(*SETTINGS_OF_STAGE), "the stage whose UNet is trained")
    lora: int = _setting(16, integer(1, 1024), "train adapters (LoRA) of this rank")
    full: bool = _setting(False, boolean(), "train all of the UNet's weights instead of adapters")
    steps: int = _setting(1000, integer(1, 10_000_000), "number of updates of the weights")
    epochs: int | None = _setting(
        None, optional(integer(1, 1_000_000)), "passes over all clips, instead of steps"
    )
    batch_size: int = _setting(1, integer(1, 1024), "clips in a batch")
    accumulate: int = _setting(1, integer(1, 1024), "batches whose mean gradient makes one update")
    learning_rate: float | None = _setting(
        None, optional(number(0, 1)), "peak learning rate; by default 1e-4 for adapters, 1e-5 for all weights"
    )
    rate_schedule: str = _setting(
        "cosine", choice(*RATE_SCHEDULES), "how the learning rate falls until the last step"
    )
    warmup: int = _setting(50, integer(0, 1_000_000), "steps over which the learning rate rises at first")
    optimizer: str = _setting(
        "adamw", choice(*OPTIMIZERS), "adamw8bit takes a quarter of the memory, and needs bitsandbytes"
    )
    weight_decay: float = _setting(1e-3, number(0, 1), "weight decay, of weights with two or more dimensions")
    clip_gradient: float = _setting(1.0, number(1e-9, 1e9), "norm to which a larger gradient is scaled down")
    ema_decay: float = _setting(
        0.999, number(0, 0.999999),
        "decay of the running average of all weights, which is what full training writes; 0 for none",
    )  # fmt: skip
    size: tuple[int, int] | None = _setting(
        None, optional(size(8, 8192)),
        "size of the clips; those of another shape get about as many pixels; by default the model's",
    )  # fmt: skip
    frames: int | None = _setting(
        None, optional(integer(1, 1024)),
        "frames of a clip; shorter videos give clips of half, a quarter, ...; by default the model's",
    )  # fmt: skip
    fps: int | None = _setting(
        None, optional(integer(1, 240)),
        "frame rate of the clips, as near as dropping frames comes to it; by default the model's",
    )  # fmt: skip
    clips: int = _setting(4, integer(1, 100_000), "most clips taken from one video")
    image_share: float = _setting(
        0.125,
        number(0, 1),
        "share of batches that are of single images, where there are images and videos",
    )
    drop_condition: float = _setting(
        0.1, number(0, 1), "probability of training a clip without its condition, as guidance needs it"
    )
    start_share: float = _setting(
        0.0, number(0, 1),
        "share of stage one's clips that are learned from noise alone, where sampling begins; a model that "
        "samples in a few steps, as the small one, needs 0.5",
    )  # fmt: skip
    checkpointing: bool = _setting(
        True, boolean(), "compute activations again for the gradient: less memory, a third more time"
    )
    precision: str = _setting(
        "auto", choice(*PRECISION_CHOICES),
        "precision of computing and of frozen weights; auto is bf16 on CUDA (fp16 before Ampere), else fp32",
    )  # fmt: skip
    seed: int = _setting(0, integer(0, 2**63 - 1), "seed of all random draws")
    save_every: int = _setting(250, integer(1, 10_000_000), "steps from one checkpoint to the next")
    keep: int = _setting(2, integer(1, 1000), "newest checkpoints to keep")
    validate_every: int = _setting(
        0, integer(0, 10_000_000), "steps from one set of validation videos to the next; 0 for none"
    )

    def __post_init__(self) -> None:
        for name, declared in self.declared().items():
            value = declared.rule.check(name, getattr(self, name), ConfigurationError)
            object.__setattr__(self, name, value)

    @classmethod
    @lru_cache(maxsize=None)
    def declared(cls) -> dict[str, Setting]:
        """Declarations by name."""
        return {each.name: each.metadata["setting"].named(each.name) for each in dataclasses.fields(cls)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainingSettings:
        """Return the settings of values by name; a name that is unknown is an error."""
        for name in values:
            if name not in cls.declared():
                raise ConfigurationError(
                    f"training has no setting {name!r}{did_you_mean(name, cls.declared())}"
                )
        return cls(**values)

    def shape_of_clips(self, model: StageSettings) -> tuple[int, int, tuple[int, int]]:
        """Return frames, frames per second and (width, height): those of a model's settings by default."""
        fps = 8 if isinstance(model.target_fps, str) else model.target_fps  # "source": of what is given
        return self.frames or model.max_frames, self.fps or fps, self.size or model.frame_size

    @property
    def rate(self) -> float:
        """The learning rate, by default that of what is trained."""
        return (1e-5 if self.full else 1e-4) if self.learning_rate is None else self.learning_rate


#: What a resumed run may be given anew: it changes no weights on the way.
CHANGEABLE = frozenset({"save_every", "keep", "validate_every", "checkpointing"})
