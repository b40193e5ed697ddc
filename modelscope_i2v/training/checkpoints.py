"""A run's last checkpoints, and the settings that a run must share with them to go on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from pathlib import Path
from typing import Any, Sequence

from ..errors import InvalidInputError
from ..settings.training import CHANGEABLE, TrainingSettings
from .encoding import EncodedClip
from .loop import Training

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a folder, of which the newest are kept; each appears when it is whole.

    Args:
        folder: is created with the first checkpoint.
        settings: of the run, kept with it.
        clips: what the run is trained on.
    """

    def __init__(self, folder: Path, settings: TrainingSettings, clips: Sequence[EncodedClip]):
        self.folder, self.settings = folder, settings
        files = [file.name for clip in clips for file in clip.files]
        self._data = hashlib.sha256("\n".join(files).encode()).hexdigest()

    def paths(self) -> list[Path]:
        """Return the checkpoints that are there, the newest last."""
        return sorted(path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+", path.stem))

    def save(self, training: Training) -> None:
        """Write a checkpoint, then remove the oldest beyond those to keep."""
        settings = dataclasses.asdict(self.settings)
        training.save(self.folder / f"step-{training.step:08}.pt", settings=settings, data=self._data)
        for path in self.paths()[: -self.settings.keep]:
            path.unlink(missing_ok=True)

    def load_last(self, training: Training) -> bool:
        """Go on from the newest checkpoint, if there is one; returns whether there is.

        Raises:
            InvalidInputError: if it is of a run with other settings.
        """
        for part in self.folder.glob(".i2v-*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
        paths = self.paths()
        if not paths:
            return False
        state = training.load(paths[-1], self._check)
        if state["data"] != self._data:
            logger.warning("the data are not those of %s: the run goes on with what is there", paths[-1])
        return True

    def _check(self, state: dict[str, Any]) -> None:
        before, now = state["settings"], dataclasses.asdict(self.settings)
        changed = [
            f"{name} was {before.get(name)!r} and is {now[name]!r}"
            for name in now
            if name not in CHANGEABLE and before.get(name) != now[name]
        ]
        if changed:
            raise InvalidInputError(
                f"resume: the run in '{self.folder.parent}' has other settings: {'; '.join(changed)}; "
                "give those, or another folder"
            )
