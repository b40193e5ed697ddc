"""Finding weights files, and loading what a network needs of them.

A file is described first (:func:`open_checkpoint`): which tensors it holds, without their data and without
running anything that the file says. Then :func:`load_weights` compares it with the network and reads the
tensors one by one into memory of their own, casting piece by piece on the way: a network takes little more
memory than its weights. The file is read rather than mapped: pages of a mapping would count as the process's
memory a second time, and one that is cut short meanwhile, by a download, would end the process.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Callable, Union

import torch
from torch import nn

from ..errors import (
    CheckpointError,
    I2VError,
    MissingFileError,
    NotEnoughMemoryError,
    is_out_of_memory,
    redact,
)
from .formats import Contents, quote_some, read_contents
from .pickles import StoredTensor

Device = Union[str, torch.device, None]

#: Types that weights may be cast to, by the setting that names them.
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

#: Elements that are read, cast and checked at a time: 1 MB in float32, which stays in a processor's cache.
_PIECE = 2**18


def precision_name(dtype: torch.dtype) -> str:
    """Return the setting that gives a type."""
    return next((name for name, each in PRECISIONS.items() if each == dtype), str(dtype))


class NotFiniteError(CheckpointError):
    """Weights that are NaN or infinite, in the file or after the cast: the ``reasons`` by their keys."""

    def __init__(self, path: str | os.PathLike, reasons: Mapping[str, str]) -> None:
        super().__init__(
            f"The weights file '{path}' cannot be used: {len(reasons)} of its weights are not finite"
            f" ({quote_some(reasons)}); the first holds {next(iter(reasons.values()))}."
        )
        self.reasons = reasons


def find_checkpoint(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """Return the path of the weights file ``name`` in a folder, or of the ``.safetensors`` file of its stem.

    ``name`` may have folders of its own, and may be an absolute path.

    Raises:
        MissingFileError: there is neither; the message names the files that are there.
        CheckpointError: it is a folder, a pipe or a device.
    """
    path = Path(folder) / name
    for candidate in (path, path.with_suffix(".safetensors") if path.name else path):
        if os.path.exists(candidate):
            if not os.path.isfile(candidate):
                raise CheckpointError(f"A weights file is needed, but '{candidate}' is {_kind(candidate)}.")
            return candidate
    shown = Path(redact(str(path)))  # a URL given for a file name
    raise MissingFileError(f"There is no weights file '{shown.name}' in '{shown.parent}': {_hint(path)}.")


def _kind(path: Path) -> str:
    return "a folder" if os.path.isdir(path) else "a pipe or a device, not a file"


def _hint(missing: Path) -> str:
    """Return what stands in the folder of a missing file that may be meant by its name."""
    if os.path.islink(missing):
        return f"it is a link to '{os.readlink(missing)}', which is not there"
    try:
        names = sorted(os.listdir(missing.parent))
    except OSError as error:
        return f"the folder cannot be read ({error.strerror})"
    similar = difflib.get_close_matches(missing.name, names[:10_000], n=3, cutoff=0.5)
    return f"did you mean {quote_some(similar)}" if similar else f"the folder holds {quote_some(names)}"


class Checkpoint(dict[str, StoredTensor]):
    """The tensors of an open weights file by key: descriptions, whose data :meth:`read` gets.

    ``others`` says what stands under the keys that hold no plain tensor. A context manager, which closes the
    file; the tensors that were read do not need it.
    """

    def __init__(self, path: Path, file: BufferedReader, contents: Contents, prefix: str) -> None:
        super().__init__()
        self.path = path
        self.others: dict[str, str] = {}
        self._prefix = prefix
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._locate = contents.locate
        self._buffer = torch.empty(16 * _PIECE, dtype=torch.uint8, device="cpu")  # of any dtype; used again
        for key, value in contents.state.items():
            if not key.startswith(prefix):
                continue
            if isinstance(value, StoredTensor):
                self[key[len(prefix) :]] = value
            else:
                self.others[key[len(prefix) :]] = getattr(value, "name", type(value).__name__)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, key: str, device: Device = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the tensor under a key, contiguous and in memory of its own.

        Args:
            key: one of the mapping's keys.
            device: where it shall be; by default on the CPU.
            dtype: what it is cast to if it is floating; by default it is not cast.

        Raises:
            NotFiniteError: a value is NaN or infinite, as it is in the file or after the cast.
            CheckpointError: the file is cut short or cannot be read.
            NotEnoughMemoryError: the device has no room for it.
        """
        stored = self[key]
        if dtype is None or not stored.dtype.is_floating_point:
            dtype = stored.dtype
        with _errors_of(self.path):
            if stored.nbytes > self._size:  # its elements lie in the file, but are repeated
                raise CheckpointError(
                    f"its tensor {key!r} of shape {list(stored.shape)} is larger than the file"
                )
            data = torch.empty(stored.span, dtype=dtype, device=device or "cpu")
            finite = self._fill(data, stored)
            tensor = data.as_strided(stored.shape, stored.stride).contiguous()
            if not finite and not tensor.double().isfinite().all():
                # Raises, too, if the numbers are not finite before the cast.
                largest = self.read(key).abs().max().item() if dtype != stored.dtype else None
                raise NotFiniteError(self.path, {self._prefix + key: _describe_overflow(dtype, largest)})
        return tensor

    def _fill(self, data: torch.Tensor, stored: StoredTensor) -> bool:
        """Read a tensor, cast on the way; return whether its sums are finite, and so its numbers."""
        self._file.seek(self._locate(stored.storage) + stored.offset * stored.dtype.itemsize)
        on_cpu = data.device.type == "cpu"
        direct = on_cpu and data.dtype == stored.dtype
        finite = True
        for piece in data.split(_PIECE):
            count = len(piece) * stored.dtype.itemsize
            source = piece if direct else self._buffer[:count].view(stored.dtype)
            if self._file.readinto(source.view(torch.uint8).numpy().data) != count:
                raise CheckpointError("it is cut short: it ends amid a tensor; download it again")
            if not direct:
                piece.copy_(source)
            finite = finite and (not on_cpu or _has_finite_sum(piece))  # while it is in the cache
        return finite and (on_cpu or _has_finite_sum(data))


def _has_finite_sum(values: torch.Tensor) -> bool:
    if not values.is_floating_point():
        return True
    if values.dtype.itemsize > 1 and math.isfinite(values.sum().item()):
        return True
    # A sum that float16 has no room for, or of a type that cannot be summed.
    return math.isfinite(values.float().sum().item())


def _describe_overflow(dtype: torch.dtype, largest: float | None) -> str:
    if largest is None:
        return "NaN or infinity in the file: download it again"
    precision = precision_name(dtype)
    wider = "bf16 or fp32" if precision == "fp16" else "fp32"
    return f"{largest:g}, and {precision} goes up to {torch.finfo(dtype).max:g}: use precision {wider}"


def open_checkpoint(path: str | os.PathLike, prefix: str = "") -> Checkpoint:
    """Open a weights file and describe the tensors whose keys begin with ``prefix``.

    Args:
        path: a file written by ``torch.save`` since its version 1.6, or in the safetensors format.
        prefix: what the wanted keys begin with; the checkpoint's own keys are without it.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the file is damaged, is something else, or holds what only running it could give.
    """
    path = Path(path)
    with _errors_of(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise CheckpointError(f"it is {_kind(path)}")
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
    ignore: Collection[str] = (),
) -> None:
    """Give ``module``, best built on the meta device, the weights in a file: exactly those that it has.

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
        ignore: keys, without ``prefix``, that the file may hold beyond the network's.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the file cannot be read safely, its tensors are not the network's, or some are not
            finite in this precision.
        NotEnoughMemoryError: the device has no room for the weights.
    """
    not_finite: dict[str, str] = {}
    with _memory_errors(path), open_checkpoint(path, prefix) as checkpoint:
        expected = _check_fit(module, checkpoint, prefix, ignore)
        for key in expected:
            try:
                _assign(module, key, layout(checkpoint.read(key, device, dtype)))
            except NotFiniteError as error:
                not_finite.update(error.reasons)
    if not_finite:
        raise NotFiniteError(path, not_finite)
    for key, buffer in list(module.named_buffers()):
        if key not in expected and not buffer.is_meta:
            cast = dtype if buffer.is_floating_point() else None
            _assign(module, key, buffer.to(device=device or "cpu", dtype=cast))


def check_weights(
    module: nn.Module, path: str | os.PathLike, prefix: str = "", *, ignore: Collection[str] = ()
) -> None:
    """Raise what :func:`load_weights` would raise before it reads any data; load nothing."""
    with open_checkpoint(path, prefix) as checkpoint:
        _check_fit(module, checkpoint, prefix, ignore)


def _check_fit(
    module: nn.Module, checkpoint: Checkpoint, prefix: str, ignore: Collection[str]
) -> Collection[str]:
    """Return the keys that a network needs, if the checkpoint has just those."""
    # On the meta device, lest what the network had be kept until the last of it is replaced.
    state = module.state_dict()
    expected = {key: value.to("meta") for key, value in state.items() if isinstance(value, torch.Tensor)}
    faults = _compare(expected, checkpoint, ignore)
    if faults:
        below = f", under {prefix!r}," if prefix else ""
        raise CheckpointError(
            f"The weights file '{checkpoint.path}'{below} does not fit the network {type(module).__name__}: "
            f"{'; '.join(faults)}."
        )
    return expected.keys()


def _compare(
    expected: Mapping[str, torch.Tensor], checkpoint: Checkpoint, ignore: Collection[str]
) -> list[str]:
    """Return what keeps the checkpoint from being loaded, one phrase for each kind of fault."""
    held = {**checkpoint, **checkpoint.others}
    missing = [key for key in expected if key not in held]
    if expected and len(missing) == len(expected):
        found = quote_some(checkpoint) if checkpoint else "no tensors there"
        return [f"none of its {len(expected)} keys ({quote_some(missing)}) is in the file, which has {found}"]
    misshapen, of_other_kind = [], []
    for key in (key for key in expected if key in checkpoint):
        stored, wanted = checkpoint[key], expected[key]
        are_floating = stored.dtype.is_floating_point and wanted.is_floating_point()
        if stored.shape != tuple(wanted.shape):
            misshapen.append(f"{key}: {list(stored.shape)} in the file, {list(wanted.shape)} in the network")
        elif stored.dtype != wanted.dtype and not are_floating:
            of_other_kind.append(f"{key}: {stored.dtype} in the file, {wanted.dtype} in the network")
    opaque = [f"{key}: {kind}" for key, kind in checkpoint.others.items() if key in expected]
    faults = {
        "missing keys": missing,
        "additional keys": [key for key in held if key not in expected and key not in ignore],
        "keys of another shape": misshapen,
        "keys of another kind of number": of_other_kind,
        "keys that hold no plain tensor": opaque,
    }
    return [f"{len(keys)} {fault} ({quote_some(keys)})" for fault, keys in faults.items() if keys]


def _assign(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer that the state dict calls ``key``."""
    owner, _, name = key.rpartition(".")
    holder = module.get_submodule(owner)
    is_parameter = isinstance(getattr(holder, name), nn.Parameter)
    setattr(holder, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


@contextmanager
def _memory_errors(path: str | os.PathLike) -> Iterator[None]:
    """Make of memory that runs out an error that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, I2VError) or not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise NotEnoughMemoryError(
            f"out of memory while reading the weights file '{path}' ({reason}): low_memory true, or precision"
            " fp16 or bf16, need less"
        ) from error


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Make of whatever a damaged file causes an error that names the file."""
    try:
        with _memory_errors(path):
            yield
    except (NotFiniteError, NotEnoughMemoryError):
        raise
    except CheckpointError as error:
        raise CheckpointError(f"The weights file '{path}' cannot be used: {error}.") from error
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no weights file '{path}'.") from error
    except OSError as error:
        raise CheckpointError(f"The weights file '{path}' cannot be read: {error}.") from error
    except Exception as error:  # the bytes may be anything, and so may be what they cause
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(
            f"The weights file '{path}' cannot be used: it is damaged ({reason}); download it again."
        ) from error
