"""A batch from its items to its results, in this process or by workers elsewhere."""

from __future__ import annotations

import os
import time
from contextlib import closing
from typing import Any, Callable, Iterable, Iterator, Mapping

from ..engine.progress import progress_bar
from ..errors import InvalidInputError
from ..settings.stages import IMAGE_TO_VIDEO, VIDEO_TO_VIDEO
from .items import Item
from .making import Maker, Models, Options, Task
from .queue import Counts, Queue, Report
from .results import BatchFolder

#: Seconds between two looks at items that other processes work on.
POLL_SECONDS = 0.5

#: Works on a queue's items and yields each with what became of it, until the queue is empty.
Workers = Callable[[Queue], Iterator[tuple[Task, Mapping[str, Any] | None]]]


def run_batch(
    items: Iterable[Item],
    folder: str | os.PathLike,
    models: Models,
    options: Options = Options(),  # noqa: B008 - it is frozen
    report: Report | None = None,
    workers: Workers | None = None,
) -> Counts:
    """Make the videos of items, but for those that are finished, and write ``results.jsonl``.

    A video is finished if the same input, keywords and models made it and its file is whole. Other processes
    may work on the same folder: an item is worked on by one at a time, and this returns when all are settled.

    Args:
        items: as ``read_items`` returns them.
        folder: for the videos and ``results.jsonl``.
        models: of the stages that the items need.
        options: of the batch.
        report: called for each item that is finished or failed, with its entry and whether this run made it.
        workers: what makes the videos, instead of this process.

    Returns:
        How many items were made, were finished already, and failed.

    Raises:
        OutputError: if the folder cannot be written.
        I2VError: for a model that cannot be loaded.
    """
    items = list(items)
    needed = {stage for item in items for stage in item.stages}
    if missing := needed.difference(models.folders):
        raise InvalidInputError(f"models: there is none for {' and '.join(sorted(missing))}")
    batch = BatchFolder(folder)
    if workers is None:
        workers = _here(Maker(batch.path, models, options))
    with progress_bar("items", len(items), show=options.progress) as bar:

        def settled(entry: Mapping[str, Any], made: bool) -> None:
            bar.update()
            if report is not None:
                report(entry, made)

        with closing(Queue(batch, items, models.identities(), settled)) as queue:
            queue.check_inputs()
            for stages in _passes(options):
                queue.begin(stages)
                for task, entry in workers(queue):
                    queue.settle(task, entry)
            return queue.counts


def _passes(options: Options) -> list[tuple[str, ...]]:
    stages = (IMAGE_TO_VIDEO, VIDEO_TO_VIDEO)
    return [(stage,) for stage in stages] if options.by_stage else [stages]


def _here(maker: Maker) -> Workers:
    """Return this process as a worker."""

    def work(queue: Queue) -> Iterator[tuple[Task, Mapping[str, Any] | None]]:
        while not queue.is_empty:
            task = queue.take()
            if task is not None:
                yield task, maker.make(task)
            elif not queue.is_empty:
                time.sleep(POLL_SECONDS)

    return work
