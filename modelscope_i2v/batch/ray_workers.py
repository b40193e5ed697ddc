"""Workers of a batch on a Ray cluster: an actor for each GPU, or for so many CPUs."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Iterator, Mapping
from urllib.parse import urlsplit

from ..errors import I2VError, InvalidInputError, MissingPackageError
from .making import Maker, Models, Options, Task, failure, signature
from .queue import Queue
from .running import POLL_SECONDS, Workers

logger = logging.getLogger(__name__)

#: How often an item is tried again whose worker died.
RETRIES = 2
#: Seconds for an address to answer.
_CONNECT_SECONDS = 10


@contextmanager
def connected(address: str = "") -> Iterator[Any]:
    """Connect to a Ray cluster, or start one on this machine, for a block.

    Args:
        address: as of ``ray.init``: ``auto``, ``host:port`` or ``ray://host:port``; by default that of
            ``RAY_ADDRESS``, as in a job on a cluster, or a new one here.

    Yields:
        The package.

    Raises:
        MissingPackageError: without Ray.
        InvalidInputError: if no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "a batch on Ray needs the ray package: pip install 'modelscope_i2v[ray]'"
        ) from error
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address:
        _check_answers(address)
        options: dict[str, Any] = {}
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours reports to nobody
        options = {"include_dashboard": False}
    try:
        ray.init(address or "local", logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise InvalidInputError(f"ray: no cluster answers at {address!r}: {words}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse at once an address at which nothing listens: Ray itself would try for a long time."""
    if not re.search(r":[0-9]+$", address):
        return
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"ray: nothing answers at {address!r}: {error}") from error


def ray_workers(
    ray: Any,
    folder: str | os.PathLike,
    models: Models,
    options: Options,
    count: int | None = None,
    cpus: int | None = None,
) -> Workers:
    """Return actors as a batch's workers.

    All nodes must see the folder, the inputs and the models under the same paths. Ray starts an actor again
    that has died, elsewhere if its node is lost, and tries its item again.

    Args:
        ray: the package, connected.
        folder, models, options: as of ``run_batch``.
        count: of workers; by default as many as the cluster has room for.
        cpus: of each worker where there are no GPUs; by default all of a node.

    Raises:
        InvalidInputError: for workers larger than any node.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 0 if models.settings.get("device") == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    needs: dict[str, Any]
    if gpus:
        needs, room = {"num_gpus": 1}, gpus
    else:
        sizes = [int(node.get("CPU", 0)) for node in nodes]
        cpus = cpus or max(min((size for size in sizes if size), default=1), 1)
        needs, room = {"num_cpus": cpus}, sum(size // cpus for size in sizes)
    if not room:
        raise InvalidInputError(f"cpus: got {cpus}, but no node of the cluster has more than {max(sizes)}")
    here = os.path.abspath(folder), _absolute(models), replace(options, progress=False)
    actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **needs)(_Actor)
    actors = [actor.remote(*here, cpus) for _ in range(count or room)]

    def work(queue: Queue) -> Iterator[tuple[Task, Mapping[str, Any] | None]]:
        # An actor is given nothing before it runs: there may be no room for it yet.
        waiting = {each.ready.remote(): each for each in actors}
        tasks: dict[Any, Task] = {}
        idle: list[Any] = []
        while tasks or not queue.is_empty:
            while idle and (task := queue.take()):
                reference = idle[-1].make.remote(task)
                waiting[reference], tasks[reference] = idle.pop(), task
            done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS) if waiting else ([], [])
            if not waiting:
                time.sleep(POLL_SECONDS)
            for reference in done:
                idle.append(waiting.pop(reference))
                task = tasks.pop(reference, None)
                entry = _result(ray, reference, task)
                if task is not None:
                    yield task, entry

    return work


def _absolute(models: Models) -> Models:
    folders = {stage: os.path.abspath(folder) for stage, folder in models.folders.items()}
    return replace(models, folders=folders)


def _result(ray: Any, reference: Any, task: Task | None) -> Any:
    """Return what an actor returned; of an item whose worker died at every try, the entry of its failure."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # a model that cannot be loaded
        if isinstance(error.cause, I2VError):
            raise error.cause from None  # whose words say it, without the worker's traceback
        raise
    except ray.exceptions.RayError as error:
        if task is None:
            raise
        died = RuntimeError(f"its worker died, at {RETRIES + 1} tries: {error}")
        return {**failure(task.item, task.key, died), **signature()}


class _Actor:
    """A process of the cluster that makes videos."""

    def __init__(self, folder: str, models: Models, options: Options, cpus: int | None):
        import torch

        if cpus is not None:
            torch.set_num_threads(cpus)
        self._maker = Maker(folder, models, options)

    def ready(self) -> None:
        """Return when the process runs."""

    def make(self, task: Task) -> Any:
        return self._maker.make(task)
