"""The items of a batch that are still to be made, shared with other processes on the same folder."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Mapping

from ..errors import I2VError
from ..media.files import check_replaceable
from ..media.sources import open_source, url_scheme
from .items import Item, file_sha256
from .making import Task, failure, first_path, signature, work_path
from .results import DONE, FAILED, BatchFolder, Claim


@dataclass
class Counts:
    """How many items were made in this run, were finished before or by others, and failed."""

    made: int = 0
    found: int = 0
    failed: int = 0


#: Called when an item is finished or has failed, with its entry and whether this run made it.
Report = Callable[[Mapping[str, Any], bool], None]


class Queue:
    """Hands out items that nobody has finished and nobody is working on, and takes what became of them.

    An item that failed before this run is made again; one that fails during it, in whichever process, is not.

    Args:
        folder: the batch's.
        items: of the batch.
        models: their identities, by stage.
        report: told of each item that is settled.
    """

    def __init__(self, folder: BatchFolder, items: Iterable[Item], models: Mapping[str, Any], report: Report):
        self._folder, self._models, self._report = folder, models, report
        self._failed_before = {
            output: entry for output, entry in folder.results().items() if entry.get("status") == FAILED
        }
        self.counts = Counts()
        self._stages: tuple[str, ...] = ()
        self._waiting: deque[Item] = deque()
        self._unsettled = {item.output: item for item in items}
        self._claims: dict[str, Claim] = {}

    def begin(self, stages: tuple[str, ...]) -> None:
        """Hand out all items again that are not settled, to go through some stages."""
        self._stages = stages
        self._waiting = deque(self._unsettled.values())

    def check_inputs(self) -> None:
        """Settle at once what cannot be made: its input is not there, or its output cannot be written."""
        for item in list(self._unsettled.values()):
            try:
                check_replaceable(self._folder.path / item.output)
                if not url_scheme(item.source):
                    open_source(item.source, "video" if item.is_video else "image", 0).close()
            except I2VError as error:
                self._settle(item, {**failure(item, None, error), **signature()}, made=True)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be handed out any more; another process's items are, as it may fail."""
        return not self._waiting

    def take(self) -> Task | None:
        """Return an item to work on; None if there is none, or others work on all that there are."""
        for _ in range(len(self._waiting)):
            item = self._waiting.popleft()
            claim = self._folder.claim(item.output)
            if claim is None:
                self._waiting.append(item)
                continue
            self._claims[item.output] = claim
            task = self._task(item)
            if task is not None:
                return task
        return None

    def _task(self, item: Item) -> Task | None:
        """Return what is to be done of a claimed item; None if nothing is, and it is let go."""
        try:
            key = item.key(self._models)
        except I2VError as error:
            self._settle(item, {**failure(item, None, error), **signature()}, made=True)
            return None
        entry = self._folder.results().get(item.output)
        if entry is not None and self._is_settled(entry, key):
            self._settle(item, entry, made=False)
            return None
        stages = tuple(stage for stage in item.stages if stage in self._stages)
        is_last = item.stages[-1] in stages
        if not stages or (not is_last and first_path(self._folder.work, key).exists()):
            self._claims.pop(item.output).release()
            return None
        return Task(item, key, stages)

    def _is_settled(self, entry: Mapping[str, Any], key: str) -> bool:
        """Whether an entry is of an item's finished video, whole, or of its failure during this run."""
        output = str(entry["output"])
        if entry.get("key") != key:
            return False
        if entry.get("status") == FAILED:
            return entry != self._failed_before.get(output)
        try:
            return file_sha256(self._folder.path / output) == entry.get("sha256")
        except I2VError:
            return False

    def settle(self, task: Task, entry: Mapping[str, Any] | None) -> None:
        """Take what became of an item; None if a later stage is still to come."""
        if entry is None:
            self._claims.pop(task.item.output).release()
        else:
            self._settle(task.item, entry, made=True, key=task.key)

    def _settle(self, item: Item, entry: Mapping[str, Any], made: bool, key: str = "") -> None:
        """Put a video in its place, write its entry and let the item go."""
        work = self._folder.work
        if made:
            if entry["status"] == DONE:
                output = self._folder.path / item.output
                try:
                    output.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(work_path(work, item, key), output)
                except OSError as error:
                    entry = {**failure(item, key, error), **signature()}
            self._folder.add(entry)
        if entry["status"] == DONE and entry.get("key"):
            first_path(work, str(entry["key"])).unlink(missing_ok=True)
        del self._unsettled[item.output]
        if claim := self._claims.pop(item.output, None):
            claim.release(settled=True)
        if entry["status"] == FAILED:
            self.counts.failed += 1
        elif made:
            self.counts.made += 1
        else:
            self.counts.found += 1
        self._report(entry, made)

    def close(self) -> None:
        """Let all items go that are still claimed."""
        for claim in self._claims.values():
            claim.release()
        self._claims.clear()
