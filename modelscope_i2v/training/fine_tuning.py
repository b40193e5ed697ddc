"""A training run: a stage's UNet, or adapters of it, trained on one's own videos and images."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import __version__
from ..engine.devices import resolve_device
from ..engine.image_to_video import ImageToVideo
from ..engine.stage import Stage
from ..engine.video_to_video import VideoToVideo
from ..errors import InvalidInputError
from ..media.files import atomic_file, check_replaceable
from ..settings.training import TrainingSettings
from ..weights.loading import PRECISIONS, precision_name
from .cache import TensorCache
from .checkpoints import Checkpoints
from .data import read_items
from .encoding import EncodedClip, Encoder, draw_clips
from .loop import Schedule, StepState, Training, optimizer_class, train
from .lora import add_lora, save_adapter
from .memory import add_checkpointing, estimate_training_memory
from .objective import Batch, Objective
from .processes import join_processes
from .results import ADAPTER, write_model, write_validation_videos

logger = logging.getLogger(__name__)

_STAGES: dict[str, type[Stage]] = {each.name: each for each in (ImageToVideo, VideoToVideo)}
_VALIDATION_VIDEOS = 4  # at most
_EVALUATION_DRAWS = 4  # of noise and timestep, for each clip


class FineTuning:
    """A run and its folder: ``output`` has what it is for, ``checkpoints`` what it goes on from.

    Beside them are ``cache`` (latents and embeddings), ``validation`` (videos) and ``logs`` (for
    TensorBoard).

    Args:
        model: the model folder.
        data: what to train on, as ``read_items`` takes it.
        folder: of the run.
        settings: what to do.
        validation: inputs of the validation videos, as ``read_items`` takes them, of which the first four
            are used; by default the first of the data.
        resume: go on from the folder's last checkpoint, if it has one.
        cache: a folder for latents and embeddings, which several runs may share.
        device: by default a GPU where there is one.
        progress: whether to show bars; by default only on a terminal.
        echo: called with each line for the user.

    Attributes:
        stage: the engine's, whose UNet is trained.
        training: the loop's state.
        clips: what is trained on.
        memory: what a step takes, estimated.

    Raises:
        I2VError: if something cannot be read, or the folder has a run and ``resume`` is not given.
    """

    def __init__(
        self,
        model: str | Path,
        data: Any,
        folder: str | Path,
        settings: TrainingSettings,
        *,
        validation: Any = None,
        resume: bool = False,
        cache: str | Path | None = None,
        device: str | torch.device | None = None,
        progress: bool | None = None,
        echo: Callable[[str], None] = logger.info,
    ):
        self.processes = join_processes()
        self.folder, self.settings, self.progress = Path(folder), settings, progress
        self.echo = echo if self._is_main else logger.debug
        if any((self.folder / "checkpoints").glob("step-*.pt")) and not resume:
            raise InvalidInputError(f"'{folder}' holds a run already: resume it, or give another folder")
        # Encoding may take hours: what would fail after it is tried before.
        check_replaceable(self.folder / "training.json")
        optimizer_class(settings.optimizer)
        items = read_items(data)
        self._validation = items[:1] if validation is None else read_items(validation)[:_VALIDATION_VIDEOS]
        self.device = self.processes.device or resolve_device(device)
        self.dtype = training_dtype(settings.precision, self.device)
        self.stage = _load(model, settings, self.device, self.dtype)
        self._make_trainable()
        kept = TensorCache(cache or self.folder / "cache")
        self.encoder = Encoder(self.stage, settings, kept, self.device)
        if self.processes.count > 1:  # each computes its share; then all read everything
            self.encoder.encode_share(items[self.processes.rank :: self.processes.count])
            self.processes.wait()
        self.clips = self.encoder.encode(items, progress)
        self.settings = settings = self._in_steps()
        self.objective = _objective(self.stage, settings, self.encoder)
        self._say_what_is_trained()
        self.training = self._begin()
        self.checkpoints = Checkpoints(self.folder / "checkpoints", settings, self.clips)
        if resume and self.checkpoints.load_last(self.training):
            self.echo(f"resumed at step {self.training.step}")

    def train(self) -> Path:
        """Train to the last step; returns the folder of the result, an adapter's or a model's."""
        for state in self.states():
            last = state.step == self.settings.steps
            if self._is_main and (last or state.step % self.settings.save_every == 0):
                self.checkpoints.save(self.training)
                self.save()
            every = self.settings.validate_every
            if self._is_main and every and (last or state.step % every == 0):
                self.validate()
        return self.output

    def states(self) -> Iterator[StepState]:
        """Train step by step, with a bar and TensorBoard's scalars."""
        writer, total = self._summary_writer(), self.settings.steps
        hidden = True if not self._is_main else None if self.progress is None else not self.progress
        loss = None
        with tqdm(total=total, initial=self.training.step, desc="training", disable=hidden) as bar:
            for state in train(self.training, self._loss):
                loss = state.loss if loss is None else loss + 0.05 * (state.loss - loss)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if writer is not None:
                    for name in ("loss", "rate", "gradient"):
                        writer.add_scalar(name, getattr(state, name), state.step)
                yield state
        if writer is not None:
            writer.close()

    @torch.no_grad()
    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Return the mean loss on data (by default the run's own), with the same draws at each call."""
        clips = self.clips if data is None else self.encoder.encode(read_items(data), self.progress)
        objective = dataclasses.replace(self.objective, drop=0.0)
        generator = torch.Generator().manual_seed(self.settings.seed)
        losses = []
        for clip in clips:
            batch = self._batch([clip] * _EVALUATION_DRAWS)
            with self._autocast():
                losses.append(objective.loss(self.result, batch, generator).item())
        return {"loss": sum(losses) / len(losses)}

    def save(self) -> Path:
        """Write the result as it stands, an adapter or a model folder; returns its folder."""
        origin = {
            "stage": self.stage.name,
            "base_model": self.stage.folder.name,
            "steps": self.training.step,
            "training": dataclasses.asdict(self.settings),
        }
        if self.settings.full:
            write_model(self.stage.folder, self.stage.name, self.result, self.output, origin)
        else:
            save_adapter(self.result, self.output / ADAPTER, origin)
        with atomic_file(self.folder / "training.json") as path:
            text = json.dumps({"code": __version__, **origin, "clips": len(self.clips)}, indent=2)
            Path(path).write_text(text + "\n", encoding="utf-8")
        return self.output

    def validate(self) -> list[Path]:
        """Write the validation videos of the present step; returns their paths."""
        trained, self.stage.unet = self.stage.unet, self.result
        folder = self.folder / "validation" / f"step-{self.training.step:08}"
        try:
            with self._autocast():
                return write_validation_videos(self.stage, self._validation, self.settings, folder)
        finally:
            self.stage.unet = trained

    @property
    def output(self) -> Path:
        """The folder of the result."""
        return self.folder / "output"

    @property
    def result(self) -> Any:
        """The UNet that is written and shown: the running average, where there is one."""
        return self.training.network if self.training.average is None else self.training.average

    @property
    def _is_main(self) -> bool:
        return self.processes.rank == 0

    def _in_steps(self) -> TrainingSettings:
        """Return the settings with as many steps as their epochs take."""
        settings = self.settings
        if settings.epochs is None:
            return settings
        clips_of_a_step = settings.batch_size * settings.accumulate * self.processes.count
        steps = math.ceil(settings.epochs * len(self.clips) / clips_of_a_step)
        return dataclasses.replace(settings, steps=steps, epochs=None)

    def _say_what_is_trained(self) -> None:
        videos = [each for each in self.clips if each.clip.frames > 1]
        self.echo(f"{len(videos)} clips and {len(self.clips) - len(videos)} images, on {self.device}")
        largest = max(self.clips, key=lambda each: each.clip.frames * each.clip.size[0] * each.clip.size[1])
        silent = sum(not each.text for each in self.clips)
        if silent and not self.stage.settings.unet.image_conditioned:
            logger.warning(
                "%d of %d clips have no caption, which stage two learns from", silent, len(self.clips)
            )
        frames, height, width = largest.tensors()["mean"].shape[1:]
        unet = self.stage.unet
        self.memory = estimate_training_memory(unet, self.settings, (frames, height, width), self.dtype)
        trained = sum(each.numel() for each in unet.parameters() if each.requires_grad)
        self.echo(f"{trained:,} weights to train in {precision_name(self.dtype)}: it takes {self.memory}")
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            if self.memory.total > free:
                logger.warning("that is more than the %.1f GiB that are free on the GPU", free / 2**30)

    def _make_trainable(self) -> None:
        """Choose what of the UNet is trained; it stays where it is."""
        settings, unet = self.settings, self.stage.unet
        if settings.full:
            unet.requires_grad_(True)
        else:
            add_lora(unet, settings.lora, generator=torch.Generator().manual_seed(settings.seed))

    def _begin(self) -> Training:
        """Put the UNet where it is trained, and start."""
        settings, unet = self.settings, self.stage.unet.to(self.device)
        self._predict, no_sync = self.processes.shared(unet)
        training = Training(
            unet,
            Schedule(settings.steps, settings.rate, settings.warmup, shape=settings.rate_schedule),
            seed=settings.seed,
            average_decay=settings.ema_decay if settings.full else 0.0,
            weight_decay=settings.weight_decay,
            clip=settings.clip_gradient,
            optimizer_name=settings.optimizer,
            accumulate=settings.accumulate,
            scaled=self.dtype == torch.float16,
            no_sync=no_sync,
        )
        if settings.checkpointing:
            add_checkpointing(unet)
        return training

    def _loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, Mapping[str, float]]:
        generator = self.processes.own(generator)
        clips = draw_clips(self.clips, self.settings.batch_size, self.settings.image_share, generator)
        batch = self._batch(clips)
        with self._autocast():
            return self.objective.loss(self._predict, batch, generator), {}

    def _batch(self, clips: Sequence[EncodedClip]) -> Batch:
        batch = vars(Batch.of(clips))
        return Batch(**{name: each.to(self.device) for name, each in batch.items()})

    def _autocast(self) -> ContextManager:
        """Where all weights are trained they are float32, and computed with in the run's precision."""
        if not self.settings.full or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _summary_writer(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.folder / "logs")) if self._is_main else None


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type of one of ``auto``, ``fp32``, ``fp16``, ``bf16``.

    ``auto`` is bfloat16 on CUDA, whose range gradients need; float16, with scaled losses, on GPUs before
    Ampere; and float32 elsewhere.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _load(model: str | Path, settings: TrainingSettings, device: torch.device, dtype: torch.dtype) -> Stage:
    """Load a stage whose networks wait on the CPU; weights that are all trained are float32."""
    precision = "fp32" if settings.full else precision_name(dtype)
    stage = _STAGES[settings.stage].load(model, device, precision=precision, low_memory=True, compile=False)
    for network in (stage.autoencoder, stage.clip_encoder):
        network.to(dtype)
    return stage


def _objective(stage: Any, settings: TrainingSettings, encoder: Encoder) -> Objective:
    own = stage.settings
    takes_image = own.unet.image_conditioned
    unconditional = torch.zeros(1, own.unet.y_dim) if takes_image else encoder.encode_text("").float()
    return Objective(
        schedule=stage.schedule,
        levels=1000 if takes_image else own.total_noise_levels,
        offset=own.noise_strength if takes_image else 0.0,
        drop=settings.drop_condition,
        unconditional=unconditional,
        takes_fps=takes_image,
        start=settings.start_share if takes_image else 0.0,
    )
