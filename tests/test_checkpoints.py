"""Loading weights: torch's own loader is the oracle for values, and every wrong file has its message."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from pretended_gpu import pretended_gpu
from torch import nn

from modelscope_i2v.errors import CheckpointError, MissingFileError, NotEnoughMemoryError
from modelscope_i2v.models.layers import in_channels_last
from modelscope_i2v.weights import find_checkpoint, load_weights, loading, open_checkpoint

SAVERS = {
    "zip": torch.save,
    "zip, protocol 4": lambda state, path: torch.save(state, path, pickle_protocol=4),
    "safetensors": lambda state, path: safetensors.torch.save_file(
        {key: value.detach().clone().contiguous() for key, value in state.items()}, path
    ),
}
TORCH_SAVERS = {name: save for name, save in SAVERS.items() if name != "safetensors"}
DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 uint16".split()


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return (numbers > 0) if dtype is torch.bool else numbers.to(dtype)


class Network(nn.Module):
    """A parameter of each rank, a submodule, and buffers of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.scale = nn.Parameter(torch.ones(()))
        if torch.get_default_device() != torch.device("meta"):
            self.register_buffer("table", torch.arange(3.0), persistent=False)


def network_on_meta() -> Network:
    with torch.device("meta"):
        return Network()


def network_state(prefix: str = "") -> dict[str, torch.Tensor]:
    network = Network()
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    state = {key: random_tensor(*shape, seed=seed) for seed, (key, shape) in enumerate(shapes.items())}
    state["body.1.num_batches_tracked"] = torch.tensor(7)
    return {prefix + key: value for key, value in state.items()}


# Values


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_values_of_every_dtype_are_those_that_were_saved(tmp_path, save):
    state = {name: random_tensor(3, 2, dtype=getattr(torch, name)) for name in DTYPES}
    save(state, tmp_path / "weights")
    with open_checkpoint(tmp_path / "weights") as checkpoint:
        assert set(checkpoint) == set(state) and not checkpoint.others
        for key, value in state.items():
            assert checkpoint[key].shape == (3, 2)
            assert checkpoint.read(key).dtype is value.dtype
            assert torch.equal(checkpoint.read(key).view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("save", TORCH_SAVERS.values(), ids=TORCH_SAVERS)
def test_views_parameters_and_shared_storages_as_torch_load_has_them(tmp_path, save):
    base = random_tensor(6, 8)
    with_attributes = nn.Parameter(random_tensor(3))
    with_attributes.note = "foreign state"
    save(
        OrderedDict(
            base=base,
            window=base[1:4, 2:7],
            transposed=base.t(),
            every_second=base[::2, 1::3],
            last=base[5, 7],
            scalar=torch.tensor(2.5),
            empty=torch.zeros(0, 3),
            expanded=torch.tensor([[1.0, 2.0]]).expand(4, 2),
            channels_last=random_tensor(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            parameter=nn.Parameter(base[2]),
            with_attributes=with_attributes,
            conjugate=random_tensor(2, dtype=torch.complex64).conj(),
        ),
        tmp_path / "weights",
    )
    oracle = torch.load(tmp_path / "weights", weights_only=False)
    with open_checkpoint(tmp_path / "weights") as checkpoint:
        assert list(checkpoint.others) == ["conjugate"] and oracle.pop("conjugate").is_conj()
        assert list(checkpoint) == list(oracle)
        for key, value in oracle.items():
            read = checkpoint.read(key)
            assert torch.equal(read, value), key
            assert read.is_contiguous() and read.untyped_storage().nbytes() == value.numel() * 4, key


@pytest.mark.parametrize("save", TORCH_SAVERS.values(), ids=TORCH_SAVERS)
@pytest.mark.parametrize("elements", [1, 5, 10**6])
def test_what_is_cast_is_read_in_pieces(tmp_path, monkeypatch, save, elements):
    """As laid out in the file, whatever its strides are."""
    monkeypatch.setattr(loading, "_PIECE", elements)
    whole = random_tensor(7, 6)
    state = {"rows": whole, "columns": whole.t(), "part": whole[1:, ::2], "none": whole[:0]}
    save(state, tmp_path / "weights")
    with open_checkpoint(tmp_path / "weights") as checkpoint:
        for key, value in state.items():
            read = checkpoint.read(key, dtype=torch.bfloat16)
            assert torch.equal(read, value.bfloat16()) and read.is_contiguous()


def test_weights_get_a_layout_as_they_come(tmp_path):
    conv = nn.Conv2d(4, 8, 3)
    torch.save(conv.state_dict(), tmp_path / "weights")
    with torch.device("meta"):
        other = nn.Conv2d(4, 8, 3)
    load_weights(other, tmp_path / "weights", layout=in_channels_last)
    assert torch.equal(other.weight, conv.weight) and torch.equal(other.bias, conv.bias)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)


def test_every_header_length_is_recognised_as_safetensors(tmp_path):
    # The length comes first in the file, and its low byte may be a pickle's first.
    for length in range(0, 400, 8):
        safetensors.torch.save_file({"k" * (length + 1): torch.ones(2)}, tmp_path / "weights")
        with open_checkpoint(tmp_path / "weights") as checkpoint:
            assert len(checkpoint) == 1


# Checkpoints with foreign content


@pytest.fixture
def lightning_checkpoint(tmp_path, monkeypatch):
    """What training with PyTorch Lightning left, read where Lightning is not installed."""
    module_name = "pytorch_lightning.callbacks.model_checkpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module_name):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    model_checkpoint = type("ModelCheckpoint", (), {"__module__": module_name})
    sys.modules[module_name].ModelCheckpoint = model_checkpoint

    def write(save):
        best = model_checkpoint()
        best.score = numpy.float32(0.5)
        state = {
            "epoch": 3,
            "global_step": 220000,
            "callbacks": {model_checkpoint: {"best": numpy.float64(0.25), "kept": [best], "of": {1, 2}}},
            "optimizer_states": [{"state": {0: {"step": 1, "dtype": numpy.dtype("float32")}}}],
            "lr_schedulers": [(1.5, None, True, b"bytes", numpy.arange(3))],
            "state_dict": network_state("first_stage_model."),
        }
        save(state, tmp_path / "v2-1_512-ema-pruned.ckpt")
        monkeypatch.undo()
        return tmp_path / "v2-1_512-ema-pruned.ckpt"

    return write


@pytest.mark.parametrize("save", TORCH_SAVERS.values(), ids=TORCH_SAVERS)
def test_foreign_classes_need_not_be_installed(lightning_checkpoint, save):
    path = lightning_checkpoint(save)
    network = network_on_meta()
    load_weights(network, path, "first_stage_model.")
    assert "pytorch_lightning" not in sys.modules
    assert all(torch.equal(network.state_dict()[key], value) for key, value in network_state().items())


def test_a_pickled_module_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        open_checkpoint(tmp_path / "weights")


@pytest.mark.parametrize(
    "value, message",
    [
        ([torch.ones(2)], "a list instead of a state dict"),
        (torch.ones(2), "a tensor instead of a state dict"),
        ({"model": {"weight": torch.ones(2)}, "epoch": 1}, "its keys are 'model', 'epoch'"),
        ({"weight": numpy.ones(2)}, "no plain tensors"),
        ({"weight": torch.ones(2).to_sparse()}, "no plain tensors"),
    ],
)
def test_what_is_no_state_dict_is_said(tmp_path, value, message):
    torch.save(value, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "weights")


# Loading into a network


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_weights_gives_every_parameter_and_buffer(tmp_path, save, dtype):
    """Floating ones are cast, and what is not in the file moves along."""
    save({**network_state("net."), "other.scale": torch.zeros(())}, tmp_path / "weights")
    for network in (network_on_meta(), Network()):
        load_weights(network, tmp_path / "weights", "net.", dtype=None if dtype is torch.float32 else dtype)
        for key, value in network_state().items():
            cast = value.to(dtype) if value.is_floating_point() else value
            assert network.state_dict()[key].dtype is cast.dtype
            assert torch.equal(network.state_dict()[key], cast), key
        assert isinstance(network.scale, nn.Parameter)
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert "body.1.running_mean" in dict(network.named_buffers())
    assert network.table.dtype is dtype


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda s: s.pop("scale"), ["1 missing keys ('scale')"]),
        (
            lambda s: s.update({"body.0.bias": torch.ones(5)}),
            ["shape", "bias: [5] in the file, [3]"],
        ),
        (
            lambda s: s.update(scale=torch.tensor(1)),
            ["scale: torch.int64 in the file"],
        ),
        (lambda s: s.update({"body.1.num_batches_tracked": torch.tensor(1.0)}), ["tracked: torch.float32"]),
        (lambda s: s.update(scale=numpy.float32(1)), ["no plain tensor", "scale: numpy.", "scalar"]),
        (lambda s: s.update(scale=1.0), ["no plain tensor", "scale: float"]),
        (lambda s: s.update(step=1), ["1 additional keys ('step')"]),
        (
            lambda s: s.update({f"x{i}": torch.ones(1) for i in range(9)}),
            ["9 additional keys ('x0', ", "and 4 more"],
        ),
        (
            lambda s: (s.pop("scale"), s.update(gain=torch.ones(()))),
            ["missing keys ('scale'); 1 additional", "'gain'"],
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_read(tmp_path, monkeypatch, change, parts):
    state = network_state()
    change(state)
    torch.save(state, tmp_path / "unet.pth")
    monkeypatch.setattr("modelscope_i2v.weights.Checkpoint.read", lambda *_: pytest.fail("data was read"))
    network = network_on_meta()
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, tmp_path / "unet.pth")
    for part in [str(tmp_path / "unet.pth"), "does not fit the network Network", *parts]:
        assert part in str(caught.value)
    assert network.scale.is_meta


def test_a_wrong_prefix_is_said_once_and_ignore_lets_pass_what_it_names_and_nothing_else(tmp_path):
    path = tmp_path / "clip.bin"
    torch.save(network_state("visual."), path)
    with pytest.raises(CheckpointError, match=r"none of its 8 keys .* in the file, which has 'visual\.scale"):
        load_weights(network_on_meta(), path)
    torch.save({**network_state(), "logit_scale": torch.ones(1)}, path)
    load_weights(network_on_meta(), path, ignore={"logit_scale"})
    with pytest.raises(CheckpointError, match=r"1 additional keys \('logit_scale'\)"):
        load_weights(network_on_meta(), path, ignore={"logit_scale_2"})


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_weights_that_are_not_finite_are_named(tmp_path, monkeypatch, save):
    monkeypatch.setattr(loading, "_PIECE", 2)
    state = network_state("net.")
    state["net.body.0.weight"][2, 3] = -65520.0  # the least that float16 rounds to infinity
    state["net.body.1.running_mean"][1] = 1e5
    path = tmp_path / "unet.pth"
    save(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(network_on_meta(), path, "net.", dtype=torch.float16)
    assert str(caught.value) == (
        f"The weights file '{path}' cannot be used: 2 of its weights are not finite ('net.body.0.weight', "
        "'net.body.1.running_mean'); the first holds 65520, and fp16 goes up to 65504: use precision bf16 or "
        "fp32."
    )
    for dtype in (None, torch.bfloat16, torch.float64):
        load_weights(network_on_meta(), path, "net.", dtype=dtype)
    state["net.body.0.weight"][:] = 65519.0  # whose sum is beyond float16
    state["net.body.1.running_mean"][1] = 65504.0
    save(state, path)
    load_weights(network_on_meta(), path, "net.", dtype=torch.float16)
    for value, dtype in [("nan", None), ("inf", torch.bfloat16), ("-inf", torch.float16)]:
        state["net.scale"] = torch.tensor(float(value))
        save(state, path)
        with pytest.raises(
            CheckpointError, match=r"1 of its .*\('net.scale'\); .* NaN or infinity in the file"
        ):
            load_weights(network_on_meta(), path, "net.", dtype=dtype)


def test_weights_are_checked_on_a_gpu_too(tmp_path):
    torch.save({"weight": torch.tensor([[1.0, 65520.0]])}, tmp_path / "weights")
    network = nn.Linear(2, 1, bias=False)
    with pretended_gpu() as gpu:
        load_weights(network, tmp_path / "weights", device=gpu, dtype=torch.bfloat16)
        assert network.weight.is_cuda
        with pytest.raises(CheckpointError, match="65520, and fp16 goes up to 65504"):
            load_weights(network, tmp_path / "weights", device=gpu, dtype=torch.float16)


def test_memory_that_really_runs_out(tmp_path):
    """A sparse file of a terabyte in a network of a terabyte."""
    header = '{"weight":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (2**38, 2**40)
    path = tmp_path / "weights"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    try:
        os.truncate(path, 8 + len(header) + 2**40)
    except OSError:
        pytest.skip("this file system has no files of a terabyte")
    network = nn.Module()
    network.weight = nn.Parameter(torch.empty(2**38, device="meta"))
    with pytest.raises(
        NotEnoughMemoryError, match="out of memory while reading the weights file.*low_memory true, or prec"
    ):
        load_weights(network, path)


MEASURE = """
import re, sys, torch
from torch import nn
from modelscope_i2v.weights import load_weights
with torch.device("meta"):
    network = nn.Sequential(*(nn.Linear(1024, 2048, bias=False) for _ in range(8)))
torch.ones(1024, 1024).to(getattr(torch, sys.argv[2])).sum().isfinite()  # brings in the code
before = int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
load_weights(network, sys.argv[1], "wanted.", dtype=getattr(torch, sys.argv[2]))
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
print((peak - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is as Linux tells it")
def test_memory_is_that_of_the_wanted_weights_and_one_tensor(tmp_path):
    state = {f"wanted.{i}.weight": torch.ones(2048, 1024) for i in range(8)}
    state["unwanted"] = torch.empty(100 * 2**20, dtype=torch.uint8)
    torch.save(state, tmp_path / "weights")
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "weights"), "float16"]
    root = Path(__file__).parents[1]
    megabytes = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)
    assert 16 < megabytes < 32 + 8 + 4 + 28  # 32 of weights, a tensor of 8 and its cast, and room to spare


# Finding files


def test_find_checkpoint(tmp_path):
    (tmp_path / "unet").mkdir()
    for name in ("a.pth", "b.safetensors", "unet/c.v1.bin"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path, "a.pth") == tmp_path / "a.pth"
    assert find_checkpoint(str(tmp_path), "b.ckpt") == tmp_path / "b.safetensors"
    assert find_checkpoint(tmp_path, "unet/c.v1.bin") == tmp_path / "unet" / "c.v1.bin"
    assert find_checkpoint(tmp_path / "unet", "../a.pth").samefile(tmp_path / "a.pth")
    assert find_checkpoint("/nowhere", tmp_path / "a.pth") == tmp_path / "a.pth"


def test_a_missing_file_is_answered_with_what_is_there(tmp_path):
    (tmp_path / "non_ema_0035000 (1).pth").touch()
    (tmp_path / "configuration.json").touch()
    with pytest.raises(
        MissingFileError, match=r"'non_ema_0035000.pth' in '.*': did you mean .*0 \(1\)\.pth'\.$"
    ):
        find_checkpoint(tmp_path, "non_ema_0035000.pth")
    with pytest.raises(MissingFileError, match="the folder holds 'configuration.json', 'non_ema"):
        find_checkpoint(tmp_path, "xyz")
    with pytest.raises(FileNotFoundError, match="the folder cannot be read"):
        find_checkpoint(tmp_path / "absent", "a.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        find_checkpoint(tmp_path, "")
    (tmp_path / "link.pth").symlink_to("gone.pth")
    with pytest.raises(MissingFileError, match="a link to 'gone.pth'"):
        find_checkpoint(tmp_path, "link.pth")
    with pytest.raises(MissingFileError, match="gone.pth"):
        open_checkpoint(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="it is a folder"):
        open_checkpoint(tmp_path)


# Wrong files


def saved(save, folder: Path) -> bytes:
    save({"weight": random_tensor(64, 64)}, folder / "saved")
    return (folder / "saved").read_bytes()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 5214604761\n"


def legacy(state: dict, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def zipped(state: dict, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.pth", b"0" * 1000)


WRONG_FILES = {
    "empty": (lambda d: b"", ["empty (0 bytes)", "download it again"]),
    "zeros": (lambda d: bytes(5000), ["filled with zeros", "5000", "download it again"]),
    "git-lfs pointer": (lambda d: LFS_POINTER, ["git-lfs pointer", "5,214,604,761 bytes", "git lfs pull"]),
    "web page": (lambda d: b"\n<!DOCTYPE html><html><body>403", ["web page (HTML)", "download"]),
    "text": (lambda d: b"Entry not found", ["not a checkpoint", "15 bytes", "'Entry not found'"]),
    "torch's older format": (lambda d: saved(legacy, d), ["before version 1.6", "save it again"]),
    "zip of a checkpoint": (lambda d: saved(zipped, d), ["no checkpoint", "'weights.pth'", "unpack"]),
    "zip cut short": (lambda d: saved(torch.save, d)[:-30], ["cut short", "download it again"]),
    "zip cut in half": (lambda d: saved(torch.save, d)[:9000], ["cut short", "9,000", "download it again"]),
    "safetensors cut short": (lambda d: saved(SAVERS["safetensors"], d)[:-1], ["cut short", "16,463"]),
    "safetensors header only": (lambda d: saved(SAVERS["safetensors"], d)[:20], ["cut short", "20"]),
    "safetensors with more": (lambda d: saved(SAVERS["safetensors"], d) + b"x", ["cut short or damaged"]),
}


@pytest.mark.parametrize("make, parts", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_told_for_what_it_is(tmp_path, make, parts):
    path = tmp_path / "unet.pth"
    path.write_bytes(make(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    for part in [str(path), *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path, save):
    save({"weight": random_tensor(512, 512)}, tmp_path / "weights")
    with open_checkpoint(tmp_path / "weights") as checkpoint:
        with open(tmp_path / "weights", "r+b") as file:
            file.truncate(2**19)
        with pytest.raises(CheckpointError, match="weights.* cut short: it ends amid a tensor"):
            checkpoint.read("weight")
