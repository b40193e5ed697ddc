"""The GPU's GroupNorm: against PyTorch's, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modelscope_i2v.models import triton_group_norm
from modelscope_i2v.models.triton_group_norm import (
    FEWEST_TILES_A_PROGRAM,
    PROGRAMS_A_MULTIPROCESSOR,
    STATISTICS_ROWS,
    group_norm_silu,
    supports,
)

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop

GROUPS = 32
H200 = 132  # multiprocessors

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, an optional package"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def channels_last(*shape: int, mean=0.0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """[n, c, *spatial] whose groups differ in mean and spread."""
    n, c, *spatial = shape
    x = torch.randn([n, *spatial, c], generator=torch.Generator(device).manual_seed(0), device=device)
    x = x * torch.linspace(0.5, 2, c, device=device) + torch.linspace(-1, 1, c, device=device) + mean
    return x.to(dtype).movedim(-1, 1)


def parameters(channels: int, dtype=torch.float32, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = torch.randn([2, channels], generator=torch.Generator().manual_seed(1)).to(device)
    return (1 + 0.1 * weight).to(dtype), bias.to(dtype)


def reference(x, groups, weight, bias, eps, silu, dtype=torch.float64) -> torch.Tensor:
    y = F.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
    return F.silu(y) if silu else y


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours.to(expected) - expected).norm() / expected.norm()).item()


def with_its_input(constants: dict[str, int], x: torch.Tensor, *arguments) -> tuple[torch.Tensor, ...]:
    """In the interpreter's process: the result, by other constants if need be, and what has become of x."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(triton_group_norm, name, value)
        return group_norm_silu(x, *arguments), x


@pytest.fixture(scope="module")
def interpreter():
    """A process in which Triton interprets its kernels: importing it settles that for a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()  # which starts the process
    with pool:
        yield pool


@pytest.fixture
def interpreted(interpreter):
    """``group_norm_silu`` by the interpreter, with what holds for every call checked."""

    def compute(x: torch.Tensor, groups: int, weight: torch.Tensor, *arguments, **constants: int):
        y, x_after = interpreter.submit(
            with_its_input, constants, x.clone(), groups, weight, *arguments
        ).result()
        torch.testing.assert_close(x_after, x, rtol=0, atol=0, equal_nan=True)
        assert (y.dtype, y.shape, y.stride()) == (weight.dtype, x.shape, x.stride())
        return y

    return compute


# Four multiprocessors' worth of programs, 32, share the rows; a program has 64 rows, or more, of 64 channels.
SHAPES = {
    "one tile": (1, 64, 4, 8),
    "one row": (2, 64, 1, 1),
    "fewer rows than a tile, half a block of channels": (3, 96, 3, 5),
    "several blocks of rows, the last with one row": (1, 64, 27, 19),
    "blocks of several tiles, and 10 channels a group": (1, 320, 25, 31),
    "several samples and blocks, 10 channels a group": (2, 320, 9, 11),
    "30 channels a group": (1, 960, 7, 11),
    "a program for all rows of a sample": (4, 320, 5, 15),
    "three spatial axes": (1, 64, 3, 7, 5),
}


@needs_triton
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_group_norm(shape, interpreted):
    x, arguments = channels_last(*shape), (GROUPS, *parameters(shape[1]), 1e-5, True)
    assert relative_error(interpreted(x, *arguments), reference(x, *arguments)) < 3e-6


@needs_triton
def test_without_silu_it_is_group_norm_alone(interpreted):
    x, arguments = channels_last(2, 64, 5, 7), (GROUPS, *parameters(64), 1e-5, False)
    assert relative_error(interpreted(x, *arguments), reference(x, *arguments)) < 3e-6


@needs_triton
@pytest.mark.parametrize("combined", [1, 8, 16])
def test_partial_statistics_that_are_combined_in_turns(combined, interpreted):
    """Nine blocks of rows, one, four and eight at once for a group's two channels."""
    x, arguments = channels_last(1, 64, 27, 19), (GROUPS, *parameters(64), 1e-5, True)
    y = interpreted(x, *arguments, COMBINED_AT_ONCE=combined)
    assert relative_error(y, reference(x, *arguments)) < 3e-6


def test_the_shapes_above_are_what_they_are_called():
    def blocks(name: str) -> tuple[int, int]:
        n, c, *spatial = SHAPES[name]
        rows = torch.Size(spatial).numel()
        block_rows = triton_group_norm._block_rows(rows, n * -(-c // 64), 4)
        return block_rows // STATISTICS_ROWS, -(-rows // block_rows)

    assert blocks("several blocks of rows, the last with one row") == (2, 9)
    assert 27 * 19 % 64 == 1
    assert blocks("blocks of several tiles, and 10 channels a group") == (5, 5)
    assert blocks("several samples and blocks, 10 channels a group") == (2, 2)
    assert blocks("a program for all rows of a sample") == (3, 1)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
def test_half_precision_is_rounded_once(dtype, silu, interpreted):
    """Every value is a neighbour of the exact one, give or take what float32 itself is unsure of."""
    x, arguments = channels_last(2, 96, 7, 13, dtype=dtype), (GROUPS, *parameters(96, dtype), 1e-6, silu)
    y, expected = interpreted(x, *arguments), reference(x, *arguments)
    # Half a step; but the interpreter, unlike a GPU, cuts bfloat16 off instead of rounding to the nearest.
    error = torch.finfo(dtype).eps / (2 if dtype == torch.float16 else 1)
    assert ((y.double() - expected).abs() <= error * expected.abs() + 1e-6).all()


@needs_triton
@pytest.mark.parametrize(
    "of_x, of_parameters, error",
    [(torch.float32, torch.bfloat16, 5e-3), (torch.float16, torch.float32, 3e-6)],
    ids=["the residual stream's float32", "half"],
)
def test_the_result_is_of_the_parameters_dtype(of_x, of_parameters, error, interpreted):
    arguments = (GROUPS, *parameters(64, of_parameters), 1e-5, True)
    x = channels_last(1, 64, 5, 7, dtype=of_x)
    assert relative_error(interpreted(x, *arguments), reference(x, *arguments)) < error


@needs_triton
def test_a_mean_far_beyond_the_spread(interpreted):
    """E[x^2] - E[x]^2 in float32 would leave little of a variance of 1 beside a mean of 1000."""
    x = channels_last(1, 64, 25, 31, mean=1000)
    x64, x32 = x.reshape(1, GROUPS, -1).double(), x.reshape(1, GROUPS, -1)
    variance = x64.var(-1, unbiased=False)
    naive = x32.square().mean(-1) - x32.mean(-1).square()
    assert ((naive - variance) / variance).abs().max() > 0.01
    arguments = (GROUPS, *parameters(64), 1e-5, False)
    # Beside 1000, float32 is unsure of 3e-5: no result of scale and shift can be nearer than that.
    assert relative_error(interpreted(x, *arguments), reference(x, *arguments)) < 1e-4


@needs_triton
def test_faint_input_shows_the_eps(interpreted):
    x = 1e-3 * channels_last(1, 64, 5, 7)
    for eps in (1e-5, 1e-6):
        arguments = (GROUPS, *parameters(64), eps, False)
        assert relative_error(interpreted(x, *arguments), reference(x, *arguments)) < 3e-6


@needs_triton
def test_one_value_that_is_not_a_number_stays_in_its_group(interpreted):
    x = channels_last(2, 64, 9, 11)
    x[1, 5, 3, 4] = float("nan")
    y = interpreted(x, GROUPS, *parameters(64), 1e-5, True)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[1, 4:6] = True
    assert torch.equal(y.isnan(), expected)


# How the rows are shared out


@pytest.mark.parametrize("programs", [1, 5, 40, 160, 5000])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 896, 1792, 14_400, 57_344, 460_800])
def test_programs_fill_the_gpu_once_and_have_enough_to_do(rows, programs):
    block_rows = triton_group_norm._block_rows(rows, programs, H200)
    row_blocks = -(-rows // block_rows)
    assert block_rows % STATISTICS_ROWS == 0
    assert block_rows >= FEWEST_TILES_A_PROGRAM * STATISTICS_ROWS
    assert row_blocks == 1 or row_blocks * programs <= PROGRAMS_A_MULTIPROCESSOR * H200


def test_a_temporal_norm_fills_an_h200():
    """Where PyTorch's kernel has 32 blocks: one sample of 32 x 90 x 160 rows, 320 channels."""
    block_rows = triton_group_norm._block_rows(460_800, 5, H200)
    assert -(-460_800 // block_rows) * 5 > 0.9 * PROGRAMS_A_MULTIPROCESSOR * H200


# What is supported


def test_a_cpus_tensors_are_left_to_pytorch():
    with torch.no_grad():
        assert not supports(channels_last(1, 64, 4, 4))


def test_without_triton_the_module_imports_and_supports_nothing():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from modelscope_i2v.models.triton_group_norm import supports
        assert not supports(torch.zeros(1, 32, 1, 1))
    """
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_that_do_not_start_are_reported_once_and_left_alone(monkeypatch, caplog):
    calls = []

    def fail(*arguments, **keywords):
        calls.append(arguments)
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(triton_group_norm, "group_norm_silu", fail)
    triton_group_norm._works.cache_clear()
    try:
        for _ in range(3):
            assert not triton_group_norm._works(torch.device("cpu"), torch.float16)
    finally:
        triton_group_norm._works.cache_clear()
    assert len(calls) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C compiler" in caplog.text


def test_a_full_gpu_is_no_reason_to_give_the_kernels_up(monkeypatch):
    def fail(*arguments, **keywords):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(triton_group_norm, "group_norm_silu", fail)
    triton_group_norm._works.cache_clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        triton_group_norm._works(torch.device("cpu"), torch.float16)
    assert triton_group_norm._works.cache_info().currsize == 0


# For a GPU's compiler


class Recorder:
    """In a kernel's place: notes the launches, and launches nothing."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **options) -> None:
            self.launches.append((self.kernel, grid, arguments, options))

        return launch


def launches_for(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch) -> list:
    """(kernel, grid, arguments, options) of the three launches on an H200, for a tensor without memory."""
    launches = []
    for name in ("_partial_statistics", "_scale_and_shift", "_apply"):
        monkeypatch.setattr(triton_group_norm, name, Recorder(getattr(triton_group_norm, name), launches))
    monkeypatch.setattr(triton_group_norm, "_multiprocessors", lambda device: H200)
    n, c, *spatial = shape
    x = torch.empty([n, *spatial, c], dtype=dtype, device="meta").movedim(-1, 1)
    weight = torch.empty(c, dtype=dtype, device="meta")
    group_norm_silu(x, GROUPS, weight, weight, 1e-5, True)
    return launches


POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compiled_for_hopper(kernel, arguments: tuple, options: dict):
    """What Triton makes of a launch: types by the arguments, and which of them are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for parameter, argument in zip(kernel.params, arguments):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", argument
        elif isinstance(argument, torch.Tensor):
            signature[name] = POINTERS[argument.dtype]
            attributes[parameter.num,] = [["tt.divisibility", 16]]
        elif isinstance(argument, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if argument % 16 == 0 and not parameter.do_not_specialize:
                attributes[parameter.num,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", 90, 32), options)


@needs_triton
@pytest.mark.parametrize("dtype", POINTERS)
def test_it_compiles_for_hopper(dtype, monkeypatch, tmp_path):
    """Without a GPU, for the launches that one would get; x is read and written 16 bytes at a time."""
    pytest.importorskip("triton", "3.3", reason="Triton's compiler is called otherwise before 3.3")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = launches_for((1, 320, 32, 14_400), dtype, monkeypatch)
    statistics, combining, applying = (
        compiled_for_hopper(kernel, arguments, options).asm for kernel, _, arguments, options in launches
    )
    for code in (statistics, combining, applying):
        assert code["cubin"]
        assert ".local" not in code["ptx"]  # registers suffice
    assert "ld.global.v4.b32" in statistics["ptx"]
    assert "ld.global.v4.b32" in applying["ptx"]
    assert "st.global.v4.b32" in applying["ptx"]


@needs_triton
def test_offsets_may_pass_32_bits(monkeypatch):
    """Grids stay far below 2^31 for the largest input, whose offsets do not."""
    shape = (64, 320, 360, 640)
    for _, grid, _, _ in launches_for(shape, torch.float16, monkeypatch):
        assert len(grid) == 1
        assert 0 < grid[0] < 2**23
    assert torch.Size(shape).numel() > 2**31


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize(
    "shape", [(32, 320, 90, 160), (1, 320, 32, 14_400), (1, 2560, 32, 230), (64, 1920, 28, 8), (3, 96, 5, 7)]
)
def test_on_a_gpu_it_is_group_norm(shape, dtype):
    x = channels_last(*shape, dtype=dtype, device="cuda")
    weight, bias = parameters(shape[1], dtype, "cuda")
    before = x.clone()
    with torch.no_grad():
        assert supports(x)
        assert not supports(x.contiguous())
        for silu in (False, True):
            y = group_norm_silu(x, GROUPS, weight, bias, 1e-5, silu)
            expected = reference(x, GROUPS, weight, bias, 1e-5, silu, dtype=torch.float32)
            assert relative_error(y, expected) < max(torch.finfo(dtype).eps / 2, 1e-5)
            assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    assert torch.equal(x, before)
    assert not supports(x)  # where gradients are wanted


@pytest.mark.gpu
@needs_triton
@needs_gpu
def test_on_a_gpu_offsets_may_pass_32_bits():
    """Of x [2, 64, 4200, 4200] the last pixels are as right as the first."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    x = torch.randn([2, 4200, 4200, 64], dtype=torch.float16, device="cuda").movedim(-1, 1)
    assert x.numel() > 2**31
    weight, bias = parameters(64, torch.float16, "cuda")
    with torch.no_grad():
        y = group_norm_silu(x, GROUPS, weight, bias, 1e-5, False)
    part = slice(-2, None)
    # So many values have the mean and the variance that they were drawn with, 0 and 1.
    expected = x[1, :, part, part].float() * weight[:, None, None] + bias[:, None, None]
    assert relative_error(y[1, :, part, part], expected) < 1e-3
