"""Work that can be gone on with: what is done of a long video, kept beside its output until that is complete.

A folder ``OUTPUT.unfinished`` holds what was asked for, the finished parts of the video, and of the scene in
work the sampler's state after a step and the predictions of the windows since then, as far as they took a
while. All that is in it is complete: each file appears under its name when it is.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InvalidInputError, OutputError, describe
from ..media.files import absolute_path, atomic_file
from ..samplers.schedules import NoiseLevel, SolverState
from ..samplers.windows import WindowVelocity

ENDING = ".unfinished"
#: What takes less is computed again rather than kept: on a fast GPU, writing would take a tenth of the time.
EVERY_SECONDS = 10.0
_JOB = "job.json"


class UnfinishedWork:
    """The folder of an output.

    Args:
        output: the file to be.
    """

    def __init__(self, output: Any):
        self.folder = Path(absolute_path(output) + ENDING)

    @property
    def job(self) -> dict[str, Any] | None:
        """What was asked for when the work was begun; None if there is none.

        Raises:
            InvalidInputError: if the folder is not one of ours, or damaged.
        """
        if not self.folder.exists():
            return None
        try:
            return dict(json.loads((self.folder / _JOB).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidInputError(
                f"{self.folder}: is no unfinished work that could be gone on with ({error}); remove it"
            ) from error

    def begin(self, job: Mapping[str, Any], resume: bool) -> None:
        """Make the folder, or go on with it.

        Raises:
            InvalidInputError: if it was begun with another job, or is there and was not asked for.
            OutputError: if it cannot be made.
        """
        before = self.job
        if before is None:
            try:
                self.folder.mkdir(parents=True)
            except OSError as error:
                raise OutputError(f"cannot write '{self.folder}': {error.strerror}") from error
            with atomic_file(self.folder / _JOB) as path:
                Path(path).write_text(json.dumps(job), encoding="utf-8")
            return
        if not resume:
            raise InvalidInputError(
                f"{self.folder}: holds unfinished work on this output: go on with resume, or remove it"
            )
        now = json.loads(json.dumps(job))
        others = [name for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
        if others:
            words = "; ".join(f"{name} was {describe(before.get(name))}" for name in others[:3])
            raise InvalidInputError(f"resume: {self.folder} was begun otherwise: {words}")

    def part(self, scene: int, first: int, ending: str) -> str:
        """Return the path of the part of a scene that begins with a frame."""
        return str(self.folder / f"{scene:05}-{first:07}{ending}")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def scene(self, number: int, reuse_interval: int = 1) -> SavedScene:
        return SavedScene(self.folder, number, reuse_interval)


class SavedScene:
    """A scene's state on disk.

    Args:
        folder: of the work.
        number: the scene's.
        reuse_interval: of steps, one in so many computes what the others use again, which is not kept: then
            only its state is, and no windows.
    """

    def __init__(self, folder: Path, number: int, reuse_interval: int = 1):
        self._state = folder / f"{number:05}.safetensors"
        self._windows, self._reuse_interval = folder / f"{number:05}.windows", reuse_interval
        self._done = folder / f"{number:05}.done"
        self._calls, self._kept_at = 0, time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether all its parts are there."""
        return self._done.exists()

    def load(self) -> tuple[SolverState, Tensor | None, int] | None:
        """Return the sampler's last state, the source's colours and the Brownian tree's seed, if any."""
        if not self._state.exists():
            return None
        tensors, metadata = _read(self._state)
        state = SolverState(int(metadata["step"]), tensors["x"], tensors.get("previous"))
        return state, tensors.get("colours"), int(metadata["entropy"])

    def _is_worth_keeping(self) -> bool:
        return time.monotonic() - self._kept_at >= EVERY_SECONDS

    def save(self, state: SolverState, colours: Tensor | None, entropy: int, always: bool = False) -> None:
        """Keep a state, and forget the predictions before it."""
        if state.step % self._reuse_interval or not (always or self._is_worth_keeping()):
            return
        tensors = {"x": state.x}
        if state.previous is not None and state.previous is not state.x:
            tensors["previous"] = state.previous
        if colours is not None:
            tensors["colours"] = colours
        _write(self._state, tensors, {"step": str(state.step), "entropy": str(entropy)})
        shutil.rmtree(self._windows, ignore_errors=True)
        self._calls, self._kept_at = 0, time.monotonic()

    def remember(self, velocity: WindowVelocity) -> WindowVelocity:
        """Wrap the prediction of windows: what was predicted since the last state is read."""
        if self._reuse_interval > 1:
            return velocity

        def remembered(x: Tensor, level: NoiseLevel, start: int) -> Tensor:
            path = self._windows / f"{self._calls:05}.safetensors"
            self._calls += 1
            if path.exists():
                return _read(path)[0]["v"].to(x.device)
            v = velocity(x, level, start)
            if self._is_worth_keeping():
                _write(path, {"v": v}, {})
                self._kept_at = time.monotonic()
            return v

        return remembered

    def finish(self) -> None:
        """Forget all but that the scene is done."""
        with atomic_file(self._done):
            pass
        self._state.unlink(missing_ok=True)
        shutil.rmtree(self._windows, ignore_errors=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(os.fspath(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with atomic_file(path) as temporary:
        try:
            save_file({name: _flat(each) for name, each in tensors.items()}, temporary, metadata)
        except (SafetensorError, OSError) as error:
            raise OutputError(f"cannot write '{path}': {error}") from error


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()
