"""What a batch keeps in its folder: the results of its items, and claims on those at work.

Locks are the system's (flock), by the filelock package: they end with their process, however that ends. On
network file systems they hold between machines as far as the system passes them on: NFS 4 and clustered
file systems do, some after a wait when a whole machine is lost; folders mounted from object stores do not.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Mapping

from filelock import BaseFileLock, FileLock, Timeout

from ..errors import OutputError
from ..media.files import absolute_path, atomic_file

RESULTS_FILE = "results.jsonl"
#: In the batch's folder: what is not a result.
WORK_FOLDER = ".batch"
DONE, FAILED = "done", "failed"


class BatchFolder:
    """The folder of a batch, which other processes may be working in, too.

    Args:
        path: made if it is not there.

    Raises:
        OutputError: if it cannot be.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(absolute_path(path))
        self.work = self.path / WORK_FOLDER
        self._results, self._lock = self.path / RESULTS_FILE, FileLock(str(self.work / "results.lock"))
        self._read_at: tuple[int, int] | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write '{self.path}': {error.strerror}") from error

    def results(self) -> Mapping[str, dict[str, Any]]:
        """Return the entries of ``results.jsonl`` by output; a line that is cut does not count."""
        try:
            status = self._results.stat()
        except FileNotFoundError:
            return {}
        state = (status.st_mtime_ns, status.st_size)
        if state != self._read_at:
            self._entries, self._read_at = {}, state
            for line in self._results.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    self._entries[entry["output"]] = entry
        return self._entries

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry, instead of an earlier one of its output.

        Raises:
            OutputError: if it cannot be written.
        """
        line = json.dumps(entry) + "\n"
        try:
            with self._lock:
                others = self.results()
                if entry["output"] in others or not self._ends_with_a_line():
                    kept = [json.dumps(each) + "\n" for each in others.values()
                            if each["output"] != entry["output"]]  # fmt: skip
                    with atomic_file(self._results) as temporary:
                        Path(temporary).write_text("".join([*kept, line]), encoding="utf-8")
                else:
                    with open(self._results, "a", encoding="utf-8") as file:
                        file.write(line)
                        file.flush()
                        os.fsync(file.fileno())
        except (OSError, NotImplementedError) as error:  # the latter where there are no locks
            raise OutputError(f"cannot write '{self._results}': {error}") from error

    def _ends_with_a_line(self) -> bool:
        """Whether what is there is whole, as it is not when its writer was killed."""
        with suppress(FileNotFoundError), open(self._results, "rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                return file.read(1) == b"\n"
        return True

    def claim(self, output: str) -> Claim | None:
        """Return a claim on an output; None while another process has it.

        Raises:
            OutputError: where there are no locks.
        """
        name = hashlib.sha256(os.fsencode(output)).hexdigest()[:32]
        lock = FileLock(str(self.work / f"{name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except (OSError, NotImplementedError) as error:
            raise OutputError(f"cannot lock '{lock.lock_file}': {error}") from error
        return Claim(lock)


class Claim:
    """An output that this process works on. It ends with ``release``, or with the process."""

    def __init__(self, lock: BaseFileLock):
        self._lock = lock

    def release(self, settled: bool = False) -> None:
        """Let the output go; its lock's file goes, too, where nobody will want the output again."""
        if settled:
            with suppress(OSError):  # Windows removes no open file
                os.unlink(self._lock.lock_file)
        self._lock.release()
