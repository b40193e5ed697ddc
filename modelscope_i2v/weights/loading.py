"""Finding weights files, and loading what a network needs of them.

A file is described first (:func:`open_checkpoint`): which tensors it holds, without their data and without
running anything that the file says. Then :func:`load_weights` compares it with the network and reads the
tensors one by one, each straight into memory of its own or, where it is cast or goes to another device, piece
by piece: a network takes little more memory than its weights. The file is read rather than mapped: pages of a
mapping would count as the process's memory a second time, and one that is cut short meanwhile, by a download,
would end the process.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator, Union

import torch
from torch import nn

from modelscope_i2v.errors import CheckpointError, MissingFileError, redact
from modelscope_i2v.weights.formats import Contents, quote_some, read_contents
from modelscope_i2v.weights.restricted_unpickler import Inert
from modelscope_i2v.weights.stored_tensors import StoredTensor

Device = Union[str, torch.device, None]

#: Elements that are read at a time on the way to another dtype or device: 4 MB in float32.
_PIECE = 2**20


def find_checkpoint(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """The weights file ``name`` in ``folder``, or the ``.safetensors`` file of the same stem.

    ``name`` may have folders of its own, and may be an absolute path.

    Raises:
        MissingFileError: there is neither; the message names the files that are there.
        CheckpointError: it is a folder.
    """
    path = Path(folder) / name
    if os.path.isdir(path):
        raise CheckpointError(f"A weights file is needed, but '{path}' is a folder.")
    for candidate in (path, path.with_suffix(".safetensors")):
        if os.path.isfile(candidate):
            return candidate
    if os.path.islink(path):
        found = f"it is a link to '{os.readlink(path)}', which is not there"
    else:
        found = _describe_folder(path)
    shown = Path(redact(str(path)))  # a URL given for a file name
    raise MissingFileError(f"There is no weights file '{shown.name}' in '{shown.parent}': {found}.")


def _describe_folder(missing: Path) -> str:
    """What stands in the folder of a ``missing`` file that may be meant by its name."""
    try:
        names = sorted(os.listdir(missing.parent))
    except OSError as error:
        return f"the folder cannot be read ({error.strerror})"
    similar = difflib.get_close_matches(missing.name, names[:10_000], n=3, cutoff=0.5)
    if similar:
        return f"did you mean {quote_some(similar)}"
    return f"the folder holds {quote_some(names)}"


class Checkpoint(Mapping[str, StoredTensor]):
    """The tensors of an open weights file by key: descriptions, whose data :meth:`read` gets.

    ``others`` says what stands under the keys that hold no plain tensor. Use it as a context manager, or
    :meth:`close` it.
    """

    def __init__(self, path: Path, file: BinaryIO, contents: Contents, prefix: str) -> None:
        self.path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._locate = contents.locate
        self._tensors: dict[str, StoredTensor] = {}
        self.others: dict[str, str] = {}
        for key, value in contents.state.items():
            if not key.startswith(prefix):
                continue
            key = key[len(prefix) :]
            if isinstance(value, StoredTensor):
                self._tensors[key] = value
            else:
                self.others[key] = value.name if isinstance(value, Inert) else type(value).__name__

    def __getitem__(self, key: str) -> StoredTensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the tensors that were read do not need it."""
        self._file.close()

    def read(self, key: str, device: Device = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor under ``key``, contiguous and in memory of its own.

        Args:
            key: one of the mapping's keys.
            device: where it shall be; by default on the CPU.
            dtype: what it is cast to if it is floating; by default it is not cast.
        """
        stored = self._tensors[key]
        with _errors_of(self.path):
            start = self._find(stored)
        device = torch.device(device or "cpu")
        if dtype is None or not stored.dtype.is_floating_point:
            dtype = stored.dtype
        if device.type == "cpu" and dtype == stored.dtype:
            data = self._read(start, stored.span, stored.dtype)
        else:
            data = torch.empty(stored.span, dtype=dtype, device=device)
            for piece in data.split(_PIECE):
                piece.copy_(self._read(start, len(piece), stored.dtype))
                start += len(piece) * stored.dtype.itemsize
        return data.as_strided(stored.shape, stored.stride).contiguous()

    def _find(self, stored: StoredTensor) -> int:
        """Where the first of a tensor's elements lies in the file."""
        if stored.nbytes > self._size:  # its elements lie in the file, but are repeated
            raise CheckpointError(
                f"it holds a tensor of shape {list(stored.shape)}, more than the file's {self._size:,} bytes"
            )
        return self._locate(stored.storage) + stored.offset * stored.dtype.itemsize

    def _read(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """So many elements from byte ``start`` on."""
        data = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu")
        memory = memoryview(data.numpy())
        with _errors_of(self.path):
            self._file.seek(start)
            while memory:
                read = self._file.readinto(memory)
                if not read:
                    raise CheckpointError("it is cut short: it ends amid a tensor; download it again")
                memory = memory[read:]
        return data.view(dtype)


def open_checkpoint(path: str | os.PathLike, prefix: str = "") -> Checkpoint:
    """Opens a weights file, in whichever format, and describes the tensors whose keys begin with ``prefix``.

    Args:
        path: a file written by ``torch.save``, old or new, or in the safetensors format.
        prefix: what the wanted keys begin with; the checkpoint's own keys are without it.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the file is damaged, is something else, or holds what only running it could give.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise MissingFileError(f"There is no weights file '{path}'.")
    if not os.path.isfile(path):
        raise CheckpointError(f"A weights file is needed, but '{path}' is none.")
    with _errors_of(path):
        file = open(path, "rb")
        try:
            return Checkpoint(path, file, read_contents(file), prefix)
        except BaseException:
            file.close()
            raise


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    prefix: str = "",
    *,
    device: Device = None,
    dtype: torch.dtype | None = None,
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
    ignore: Iterable[str] | Callable[[str], bool] = (),
) -> None:
    """Gives ``module``, best built on the meta device, the weights in a file: exactly those that it has.

    Names and shapes are compared before any data is read. The parameters are replaced by new ones that need
    no gradient. Buffers that are not persistent are no part of a checkpoint: they are moved and cast along
    unless they are on the meta device.

    Args:
        module: the network; it keeps what it had if the file does not fit.
        path: the weights file, as :func:`open_checkpoint` takes it.
        prefix: what the network's keys begin with in the file; all others there do not matter.
        device: where the weights shall be; by default on the CPU.
        dtype: what floating weights are cast to; by default they stay as they are in the file.
        layout: gives a weight, as it comes, the memory layout that it shall have.
        ignore: what the file may hold beyond the network: keys without ``prefix``, beginnings of keys that
            end in a dot, or a function that tells of a key whether it may be there.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the file cannot be read safely, or its tensors are not the network's.
    """
    with open_checkpoint(path, prefix) as checkpoint:
        expected = _checked(module, checkpoint, prefix, ignore)
        for key in expected:
            _assign(module, key, layout(checkpoint.read(key, device, dtype)))
    _move_other_buffers(module, expected, device, dtype)


def check_weights(
    module: nn.Module,
    path: str | os.PathLike,
    prefix: str = "",
    *,
    ignore: Iterable[str] | Callable[[str], bool] = (),
) -> None:
    """Raise what :func:`load_weights` would raise before it reads any data; load nothing."""
    with open_checkpoint(path, prefix) as checkpoint:
        _checked(module, checkpoint, prefix, ignore)


def _checked(
    module: nn.Module, checkpoint: Checkpoint, prefix: str, ignore: Iterable[str] | Callable[[str], bool]
) -> Iterable[str]:
    """The keys that a network is to be given, if the checkpoint has just those."""
    # On the meta device, lest what the network had be kept until the last of it is replaced.
    state = module.state_dict()
    expected = {key: value.to("meta") for key, value in state.items() if isinstance(value, torch.Tensor)}
    problems = _compare(expected, checkpoint, _as_predicate(ignore))
    if problems:
        under = f", under {prefix!r}," if prefix else ""
        raise CheckpointError(
            f"The weights file '{checkpoint.path}'{under} does not fit the network {type(module).__name__}: "
            f"{'; '.join(problems)}."
        )
    return expected.keys()


def _as_predicate(ignore: Iterable[str] | Callable[[str], bool]) -> Callable[[str], bool]:
    if callable(ignore):
        return ignore
    names = {ignore} if isinstance(ignore, str) else set(ignore)
    beginnings = tuple(name for name in names if name.endswith("."))
    return lambda key: key in names or key.startswith(beginnings)


def _compare(
    expected: Mapping[str, torch.Tensor], checkpoint: Checkpoint, ignored: Callable[[str], bool]
) -> list[str]:
    """What keeps the checkpoint from being loaded, one phrase for each kind of fault."""
    missing = [key for key in expected if key not in checkpoint and key not in checkpoint.others]
    if expected and len(missing) == len(expected):
        found = quote_some(checkpoint) if checkpoint else "no tensors there"
        return [f"none of its {len(expected)} keys ({quote_some(missing)}) is in the file, which has {found}"]
    held = (*checkpoint, *checkpoint.others)
    additional = [key for key in held if key not in expected and not ignored(key)]
    opaque = {key: kind for key, kind in checkpoint.others.items() if key in expected}
    misshapen, of_other_kind = [], []
    for key in (key for key in expected if key in checkpoint):
        stored, wanted = checkpoint[key], expected[key]
        are_floating = stored.dtype.is_floating_point and wanted.is_floating_point()
        if stored.shape != tuple(wanted.shape):
            misshapen.append(f"{key}: {list(stored.shape)} in the file, {list(wanted.shape)} in the network")
        elif stored.dtype != wanted.dtype and not are_floating:
            of_other_kind.append(f"{key}: {stored.dtype} in the file, {wanted.dtype} in the network")
    faults = (
        ("missing keys", missing),
        ("additional keys", additional),
        ("keys of another shape", misshapen),
        ("keys of another kind of number", of_other_kind),
        ("keys that hold no plain tensor", [f"{key}: {kind}" for key, kind in opaque.items()]),
    )
    return [f"{len(keys)} {fault} ({quote_some(keys)})" for fault, keys in faults if keys]


def _assign(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Puts ``tensor`` in the place of the parameter or buffer that the state dict calls ``key``."""
    owner, _, name = key.rpartition(".")
    holder = module.get_submodule(owner)
    is_parameter = isinstance(getattr(holder, name), nn.Parameter)
    setattr(holder, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _move_other_buffers(
    module: nn.Module, loaded: Iterable[str], device: Device, dtype: torch.dtype | None
) -> None:
    """Brings the buffers that no checkpoint holds to where the weights are."""
    for key, buffer in list(module.named_buffers()):
        if key not in loaded and not buffer.is_meta:
            cast = dtype if buffer.is_floating_point() else None
            _assign(module, key, buffer.to(device=device or "cpu", dtype=cast))


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Makes of whatever a damaged file causes an error that names the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"The weights file '{path}' cannot be used: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"The weights file '{path}' cannot be read: {error}.") from error
    except Exception as error:  # the bytes may be anything, and so may be what they cause
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(
            f"The weights file '{path}' cannot be used: it is damaged ({reason}); download it again."
        ) from error
