"""ModelScope's trainers of the two tasks: a thin door to the training of ``modelscope_i2v.training``."""

from __future__ import annotations

import os
from typing import Any, Callable, ClassVar, Mapping

from modelscope.hub.snapshot_download import snapshot_download
from modelscope.trainers.base import BaseTrainer
from modelscope.trainers.builder import TRAINERS
from modelscope.utils.config import Config, ConfigDict
from modelscope.utils.logger import get_logger

from ..errors import InvalidInputError, MissingFileError, describe
from ..settings.configuration import FILE_NAME, read_configuration
from ..settings.rules import nearest
from ..settings.training import TrainingSettings
from ..training.data import read_items
from ..training.fine_tuning import FineTuning
from .registration import IMAGE_TO_VIDEO, TRAINER_GROUP, VIDEO_TO_VIDEO, register_class

logger = get_logger()

#: Our settings by ModelScope's names for them: in the ``train`` section, or as keywords.
_MODELSCOPE_NAMES = {"max_epochs": "epochs", "max_iters": "steps", "lora_rank": "lora"}
#: ModelScope's sections within ``train``: its names there, and our settings.
_MODELSCOPE_SECTIONS = {
    "optimizer": {"type": "optimizer", "lr": "learning_rate", "weight_decay": "weight_decay"},
    "dataloader": {"batch_size_per_gpu": "batch_size"},
}


class StageTrainer(BaseTrainer):
    """Trains a stage: an adapter (LoRA) by default, all weights with ``full=True``.

    ``work_dir`` gets the result in ``output``: ``pipeline(..., lora_dir=work_dir + '/output')`` loads an
    adapter, ``pipeline(..., model=work_dir + '/output')`` a model.

    Example::

        trainer = build_trainer('image-to-video-trainer', default_args=dict(
            model='damo/Image-to-Video', train_dataset='clips', work_dir='run', steps=500))
        trainer.train()
    """

    stage: ClassVar[str]
    cfg: Any

    def __init__(
        self,
        model: Any = None,
        cfg_file: str | None = None,
        cfg_modify_fn: Callable[[Any], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        work_dir: str | None = None,
        model_revision: str | None = None,
        device: str | None = None,
        resume: bool = False,
        **kwargs: Any,
    ):
        """Settle what is to be done; the model is loaded, and data are read, when it is begun.

        Args:
            model: a model folder, an id on the hub, or a ModelScope model.
            cfg_file: a ``configuration.json``, instead of the model's: its ``train`` section may have the
                settings of training.
            cfg_modify_fn: is given that configuration, and returns it changed.
            train_dataset: a folder, a data set of ModelScope, or any rows with ``video`` or ``image`` and
                ``text``.
            eval_dataset: such, for ``evaluate`` and for validation videos.
            work_dir: of the run; by default ``./work_dir``.
            model_revision: of a model on the hub.
            device: as ModelScope names it.
            resume: go on from the last checkpoint in ``work_dir``.
            **kwargs: settings of training, which go before the configuration's: see ``TrainingSettings``.
        """
        self.model_dir = _model_folder(model, model_revision)
        read_configuration(self.model_dir)  # whose errors say more than ModelScope's
        super().__init__(cfg_file or os.path.join(self.model_dir, FILE_NAME))
        defaults = _with_train_section(self.cfg)
        if cfg_modify_fn is not None:
            self.cfg = cfg_modify_fn(self.cfg) or self.cfg
        values = {**_changed(self.cfg.train, defaults), **_known(kwargs)}
        self.settings = TrainingSettings.of({**values, "stage": self.stage})
        self.work_dir = work_dir or self.cfg.train.get("work_dir") or "./work_dir"
        self.train_dataset, self._device, self._resume = train_dataset, device, resume
        self.eval_dataset = None if eval_dataset is None else read_items(eval_dataset)
        self._run: FineTuning | None = None

    @property
    def run(self) -> FineTuning:
        """The run, which is begun when it is first asked for."""
        if self._run is None:
            data = self.eval_dataset if self.train_dataset is None else self.train_dataset
            if data is None:
                raise InvalidInputError(f"{self.stage}: train_dataset is needed")
            self._run = FineTuning(
                self.model_dir,
                data,
                self.work_dir,
                self.settings,
                validation=self.eval_dataset,
                resume=self._resume,
                device=self._device,
                echo=logger.info,
            )
        return self._run

    def train(self, *args: Any, **kwargs: Any) -> str:
        """Train to the last step; returns the folder of the result, ``work_dir``'s ``output``."""
        return str(self.run.train())

    def evaluate(self, checkpoint_path: str | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss on ``eval_dataset``, or without one on what is trained on.

        Args:
            checkpoint_path: one of the run's checkpoints, to go back to; by default all is as it stands.
        """
        if checkpoint_path is not None:
            if not os.path.isfile(checkpoint_path):
                raise MissingFileError(f"there is no checkpoint {checkpoint_path!r}")
            self.run.training.load(checkpoint_path)
        return self.run.evaluate(self.eval_dataset)


@register_class(TRAINERS, TRAINER_GROUP, "image-to-video-trainer")
class ImageToVideoTrainer(StageTrainer):
    """Trains stage one."""

    stage = IMAGE_TO_VIDEO


@register_class(TRAINERS, TRAINER_GROUP, "video-to-video-trainer")
class VideoToVideoTrainer(StageTrainer):
    """Trains stage two."""

    stage = VIDEO_TO_VIDEO


def _model_folder(model: Any, revision: str | None) -> str:
    folder = getattr(model, "model_dir", model)
    if not isinstance(folder, (str, os.PathLike)):
        raise InvalidInputError(
            f"model: a folder, an id on the hub or a model is needed, got {describe(model)}"
        )
    folder = os.fspath(folder)
    return folder if os.path.exists(folder) else snapshot_download(folder, revision=revision)


def _with_train_section(cfg: Config) -> dict[str, Any]:
    """Fill a configuration's ``train`` section up with the defaults, and return these.

    So ``cfg_modify_fn`` finds our names there, and ModelScope's own.
    """
    declared = TrainingSettings.declared()
    own: dict[str, Any] = {name: getattr(TrainingSettings(), name) for name in declared if name != "stage"}
    defaults: dict[str, Any] = {name: each for name, each in own.items() if name != "optimizer"}
    for section, names in _MODELSCOPE_SECTIONS.items():
        defaults[section] = {theirs: own[ours] for theirs, ours in names.items()}
    train = ConfigDict(defaults)
    for name, value in (getattr(cfg, "train", None) or {}).items():
        is_section = isinstance(value, Mapping) and isinstance(defaults.get(name), dict)
        train[name] = {**train[name], **value} if is_section else value
    cfg.train = train
    return defaults


def _changed(train: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``train`` section has beyond the defaults, under our names."""
    values: dict[str, Any] = {}
    for name, value in train.items():
        if name in _MODELSCOPE_SECTIONS and isinstance(value, Mapping):
            for theirs, ours in _MODELSCOPE_SECTIONS[name].items():
                if theirs in value and value[theirs] != defaults[name][theirs]:
                    values[ours] = value[theirs]
        elif name in _MODELSCOPE_NAMES:
            values[_MODELSCOPE_NAMES[name]] = value
        elif name in TrainingSettings.declared() and value != defaults.get(name):
            values[name] = value
    if isinstance(values.get("optimizer"), str):
        values["optimizer"] = values["optimizer"].lower()  # AdamW
    return values


def _known(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among the keywords, under our names; a warning names what resembles one."""
    values, declared = {}, TrainingSettings.declared()
    for name, value in kwargs.items():
        ours = _MODELSCOPE_NAMES.get(name, name)
        if ours in declared:
            values[ours] = value
        elif (near := nearest(name, declared)) is not None:
            logger.warning(f"the keyword {name!r} is ModelScope's or unknown; did you mean {near!r}?")
    return values
