"""``scripts/benchmark.py``: every row has a number or a reason, and what does not agree is not compared."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

from benchmarking import lengths as benchmark_lengths  # noqa: E402
from benchmarking import own_rows as benchmark_own_rows  # noqa: E402
from benchmarking import rows as benchmark_rows  # noqa: E402
from benchmarking.command import build_parser, main  # noqa: E402
from benchmarking.distances import psnr  # noqa: E402
from benchmarking.folders import lacks_disk, read_settings, write_configuration, write_weights  # noqa: E402
from benchmarking.fresh import ProcessFailed  # noqa: E402
from benchmarking.operations import kind_of  # noqa: E402
from benchmarking.options import DEFAULT_KINDS, KINDS, OWN_KINDS, STOCK_KINDS, Options  # noqa: E402
from benchmarking.ours import Ours  # noqa: E402
from benchmarking.own_rows import approximate_modes, generations_beside, own_row_names  # noqa: E402
from benchmarking.report import own_table, table  # noqa: E402
from benchmarking.rows import DisagreementError, compare, row_names  # noqa: E402
from benchmarking.sizes import TINY, draw_case  # noqa: E402
from benchmarking.stock import Stock, stand_ins  # noqa: E402
from benchmarking.timing import Missing, OwnRow, Row, Samples, in_rounds, in_turn  # noqa: E402

from modelscope_i2v.errors import MissingPackageError  # noqa: E402

CPU = torch.device("cpu")
#: Of every run here: size tiny, in the precision in which the sides have to agree.
ON_CPU = ("--size", "tiny", "--device", "cpu", "--precision", "fp32")
#: What the stock modules import; none of it may be left behind where it is not installed.
STAND_INS = ("xformers", "fairscale", "rotary_embedding_torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What ``--folder`` is given; the weights of size tiny are in it."""
    root = tmp_path_factory.mktemp("benchmark")
    tiny = root / "tiny"
    write_configuration(tiny, TINY)
    for stage in (1, 2):
        write_weights(tiny, read_settings(tiny, stage))
    return root


@pytest.fixture(scope="module")
def sides(folder) -> dict[int, tuple[Stock, Ours]]:
    """Both sides of each stage."""
    cases = {stage: draw_case(stage, read_settings(folder / "tiny", stage)) for stage in (1, 2)}
    return {
        stage: (Stock(folder / "tiny", case, CPU), Ours(folder / "tiny", case, CPU, "fp32"))
        for stage, case in cases.items()
    }


def options_of(folder: Path, **given: object) -> Options:
    """Of a run in size tiny."""
    asked = {"precision": "fp32", "repeats": 1, "kinds": DEFAULT_KINDS, **given}
    return Options(size=TINY, device=CPU, folder=folder / "tiny", **asked)


def cells_of(text: str) -> dict[str, list[str]]:
    """The cells of each line of a Markdown table, by the first."""
    lines = [line for line in text.splitlines() if line.startswith("| stage")]
    return {
        cells[0]: cells[1:] for cells in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    }


def test_the_script_finds_its_parts_and_the_checkout(monkeypatch):
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() not in (SCRIPTS, SCRIPTS.parent)]
    monkeypatch.setattr(sys, "path", [*elsewhere])
    script = runpy.run_path(str(SCRIPTS / "benchmark.py"), run_name="benchmark")
    assert script["main"] is main
    assert sys.path == [str(SCRIPTS), str(SCRIPTS.parent), *elsewhere]


@pytest.mark.parametrize("stage", [1, 2])
def test_every_row_has_a_number_or_a_reason(folder, stage, monkeypatch, tmp_path, capsys):
    def loaded(side, *_):
        if side == "stock":
            raise ProcessFailed("no such file")
        return {"seconds": 0.5, "host_mib": 100.0, "weights_mib": 90.0}

    monkeypatch.setattr(benchmark_rows, "load_in_fresh_process", loaded)
    path = tmp_path / "table.md"
    arguments = [*ON_CPU, "--threads", "1", "--stage", str(stage), "--profile"]
    assert main([*arguments, "--repeats", "1", "--folder", str(folder), "--markdown", str(path)]) == 0
    captured = capsys.readouterr()
    assert path.read_text(encoding="utf-8").strip() == captured.out.strip()
    for side in ("stock", "ours"):
        assert f"stage {stage}, one guided step, {side}: " in captured.err
    for kind in ("convolution", "linear", "attention", "norm", "elementwise", "copies"):
        assert sum(line.startswith(f"  {kind} ") for line in captured.err.splitlines()) == 2
    found = cells_of(path.read_text(encoding="utf-8"))
    options = options_of(folder)
    names = {**row_names(stage, options), **own_row_names(stage, options)}
    assert list(found) == [name for kind in DEFAULT_KINDS for name in names[kind]]
    for kind in ("step", "encode", "decode", "stage"):
        for name in names[kind]:
            stock, ours, ratio, difference = found[name]
            assert stock.endswith(" s") and ours.endswith(" s")
            assert float(ratio) > 0 and float(difference) < 1e-4
    seconds, host, weights = names["loading"]
    assert found[seconds] == ["- (no such file)", "0.500 (0.500-0.500) s", "-", "-"]
    assert found[host][:2] == ["- (no such file)", "100 (100-100) MiB"]
    assert found[weights][:2] == ["- (no such file)", "90 (90-90) MiB"]
    assert found[names["memory"][0]] == ["- (needs a CUDA device)"] * 2 + ["-", "-"]
    reason = "- (--precision fp32 is fp32 here: ask for fp16 or bf16)"
    assert found[names["precision"][0]] == [reason] * 2 + ["-"] * 3


@pytest.mark.parametrize("stage", [1, 2])
def test_half_precision_and_approximate_modes_have_gains_and_distances(folder, stage, capsys):
    arguments = [*ON_CPU, "--precision", "bf16", "--stage", str(stage), "--rows", "precision,approximate"]
    # With five steps, one is outside of each interval of guidance.
    assert main([*arguments, "--steps", "5", "--repeats", "1", "--folder", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "stand-ins" not in text  # the stock has no part in these
    found = cells_of(text)
    names = own_row_names(stage, options_of(folder, steps=5, precision="bf16"))
    assert list(found) == [name for kind in OWN_KINDS for name in names[kind]]
    for reference, measured, gain, difference, decibels in found.values():
        assert reference.endswith(" s") and measured.endswith(" s")
        assert float(gain) > 0 and float(difference) > 0 and 0 < float(decibels) < 100


def test_what_computes_the_same_is_at_no_distance_and_what_is_refused_has_a_reason(sides):
    for _, ours in sides.values():
        exact = {"steps": 2}
        others = {"same": {**exact, "reuse_interval": 1}, "refused": {**exact, "reuse_intervals": 2}}
        same, refused = generations_beside(ours, exact, others, 1, print)
        assert same.difference == 0 and same.psnr == float("inf") and same.gain > 0
        assert "has no keyword 'reuse_intervals'" in refused.measured.reason
        assert refused.gain is refused.psnr is None


def test_the_steps_asked_for_are_those_that_are_measured(folder, monkeypatch):
    asked = []

    def generate(_, **keywords):
        asked.append(keywords)
        return torch.ones(1, 3, 2, 4, 4)

    def missing(*_):
        raise ImportError

    monkeypatch.setattr(Ours, "generate", generate)
    monkeypatch.setattr(benchmark_rows, "Stock", missing)
    arguments = [*ON_CPU, "--stage", "1", "--rows", "stage,approximate", "--repeats", "1", "--steps", "10"]
    assert main([*arguments, "--folder", str(folder)]) == 0
    modes = approximate_modes(1, 10)
    assert [mode.get("steps") for mode in modes[:3]] == [4, 5, None]
    # The whole stage once unmeasured and once measured; before the other rows a shorter call for each.
    exact, measured = {"steps": 10}, [{"steps": 10, **mode} for mode in modes]
    warm_up = [{**keywords, "steps": min(keywords["steps"], 5)} for keywords in [exact, *measured]]
    assert asked == [exact, exact, *warm_up, exact, *measured]
    published = options_of(folder, kinds=OWN_KINDS)
    assert "stage 1: solver=dpmpp, steps=20" in own_row_names(1, published)["approximate"]


def test_videos_are_compared_as_they_are_shown():
    video = torch.zeros(1, 3, 2, 4, 4)
    assert psnr(video + 0.2, video) == pytest.approx(20)
    assert psnr(video + 1.5, video + 1) == float("inf")  # both are white


def test_compiling_has_a_row(folder, monkeypatch, capsys):
    compiled = []

    def compile_nothing(function, **_):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    seconds = iter([5.0, 2.0])
    monkeypatch.setattr(benchmark_rows, "timed", lambda run, device: next(seconds, 1.0))
    arguments = [*ON_CPU, "--stage", "1", "--rows", "decode", "--compile", "--repeats", "1"]
    assert main([*arguments, "--folder", str(folder)]) == 0
    text = capsys.readouterr().out
    assert compiled and "ours (fp32, compiled)" in text
    assert cells_of(text)["stage 1: compiling"] == ["- (is not compiled)", "3 (3-3) s", "-", "-"]


def test_loading_is_measured_in_a_fresh_process(folder, sides, monkeypatch):
    measured = benchmark_rows.load_in_fresh_process("ours", folder / "tiny", 1, CPU, "fp32")
    assert measured["seconds"] > 0
    settings = read_settings(folder / "tiny", 1)
    unet = (folder / "tiny" / settings.ckpt_unet).stat().st_size
    assert unet < measured["host_mib"] * 2**20 < 2**30
    stock, ours = (sum(each.nbytes for each in side.weights()) for side in sides[1])
    assert measured["weights_mib"] * 2**20 == ours < stock  # which has CLIP's other tower, too
    monkeypatch.setattr(sys, "executable", str(folder / "tiny" / "failing"))
    Path(sys.executable).write_text("#!/bin/sh\necho Traceback >&2; echo 'OSError: why' >&2; exit 1\n")
    Path(sys.executable).chmod(0o755)
    with pytest.raises(ProcessFailed, match="^OSError: why$"):
        benchmark_rows.load_in_fresh_process("ours", folder / "tiny", 1, CPU, "fp32")


@pytest.mark.parametrize(
    ("stage", "kind", "part"),
    [
        (1, "step", "generator.input_blocks.1.0.temopral_conv.conv4.3.weight"),
        (2, "step", "generator.middle_block.1.transformer_blocks.0.attn2.to_k.weight"),
        (1, "decode", "autoencoder.decoder.up.0.block.0.conv1.weight"),
        (2, "encode", "autoencoder.encoder.down.1.block.0.norm1.bias"),
        (1, "stage", "clip.model.visual.proj"),
    ],
)
def test_a_changed_weight_is_noticed(sides, stage, kind, part):
    stock, ours = sides[stage]
    attribute, _, name = part.partition(".")
    weight = getattr(stock, attribute).get_parameter(name).data
    original = weight.clone()
    weight.mul_(1.01).add_(0.01)
    with pytest.raises(DisagreementError, match=f"{kind}: the outputs of the two sides differ"):
        compare(stock, ours, [kind])
    weight.copy_(original)
    assert compare(stock, ours, [kind])[kind] < 1e-4


def test_a_disagreement_ends_the_benchmark(folder, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_rows, "TOLERANCE", 0.0)
    arguments = [*ON_CPU, "--stage", "1", "--rows", "decode"]
    assert main([*arguments, "--folder", str(folder)]) == 1
    captured = capsys.readouterr()
    assert not captured.out and "decode: the outputs of the two sides differ by" in captured.err


def test_the_stand_ins_are_taken_away_again():
    def left() -> dict[str, object]:
        held = (*STAND_INS, "modelscope.models.multi_modal.image_to_video.")
        return {name: module for name, module in sys.modules.items() if name.startswith(held)}

    before = left()
    with stand_ins(CPU) as names:
        import xformers.ops

        assert "xformers" in names and sys.modules["xformers.ops"] is xformers.ops
        import modelscope.models.multi_modal.image_to_video.modules  # noqa: F401
    assert left() == before
    with pytest.raises(ZeroDivisionError), stand_ins(CPU):
        _ = 1 / 0
    assert left() == before


def test_without_the_stock_ours_is_measured_alone(folder, monkeypatch, capsys):
    def missing(*_):
        raise ImportError("No module named 'stock'")

    monkeypatch.setattr("benchmarking.stock.import_stock", missing)
    monkeypatch.setattr("benchmarking.report.import_stock", missing)
    arguments = [*ON_CPU, "--stage", "2", "--rows", "encode", "--repeats", "1"]
    assert main([*arguments, "--folder", str(folder)]) == 0
    stock, ours, ratio, difference = cells_of(capsys.readouterr().out)["stage 2: VAE encode"]
    assert "No module named 'stock'" in stock and ours.endswith(" s") and ratio == difference == "-"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), "CUDA out of memory"),
        (MissingPackageError("compile: torch.compile does not work here"), "compile: torch.compile does not"),
    ],
)
def test_what_a_machine_has_not_is_a_reason(folder, monkeypatch, capsys, error, reason):
    def fail(*_):
        raise error

    monkeypatch.setattr(benchmark_rows, "Ours", fail)
    monkeypatch.setattr(benchmark_own_rows, "Ours", fail)
    arguments = [*ON_CPU, "--stage", "1", "--rows", "memory,step,precision,approximate"]
    assert main([*arguments, "--precision", "bf16", "--folder", str(folder)]) == 0
    found = cells_of(capsys.readouterr().out)
    assert len(found) == 9
    assert found.pop("stage 1: peak device memory") == ["- (needs a CUDA device)"] * 2 + ["-", "-"]
    for name, (left, right, *numbers) in found.items():
        assert left == right and left.startswith(f"- ({reason}") and set(numbers) == {"-"}, name


def test_too_little_disk_is_a_reason(folder, monkeypatch, tmp_path):
    write_configuration(tmp_path, TINY)
    settings = read_settings(tmp_path, 1)
    assert lacks_disk(tmp_path, settings) == ""
    usage = argparse.Namespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert "its files need 0.4 GB of disk, 0.0 GB are free" in lacks_disk(tmp_path, settings)
    assert lacks_disk(folder / "tiny", settings) == ""  # they are there already


def test_lengths_and_both_stages_have_tables_of_their_own(folder, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_lengths, "in_fresh_process", lambda _, *given: 10.0 * given[2])
    arguments = [*ON_CPU, "--rows", "memory,length", "--steps", "1", "--repeats", "1"]
    assert main([*arguments, "--folder", str(folder)]) == 0
    text = capsys.readouterr().out
    found = cells_of(text)
    assert len(found) == 2 + 6 and "ours, denoising, 1 steps (fp32)" in text
    for stage in (1, 2):
        for frames, count in ((2, 1), (4, 2), (8, 4)):
            windows, seconds, a_frame, a_window, memory = found[f"stage {stage}: {frames} frames"]
            assert windows == str(count) and memory == f"{10 * frames} ({10 * frames}-{10 * frames}) MiB"
            assert float(a_frame) * frames == pytest.approx(float(seconds.split()[0]), rel=0.05, abs=2e-3)
            assert float(a_window) == pytest.approx(frames / count * float(a_frame), rel=0.02)
    line = "| both stages: peak device memory | - (needs a CUDA device) | - (needs a CUDA device) | "
    assert line in text


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::slow_conv3d_forward", "convolution"),
        ("aten::cudnn_convolution", "convolution"),
        ("aten::addmm", "linear"),
        ("aten::mm", "linear"),
        ("aten::add_", "elementwise"),
        ("aten::silu", "elementwise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::bmm", "attention"),
        ("aten::native_group_norm", "norm"),
        ("aten::copy_", "copies"),
        ("aten::cat", "copies"),
        ("aten::upsample_nearest2d", "copies"),
        ("aten::empty", "other"),
    ],
)
def test_operations_are_told_apart(operation, kind):
    assert kind_of(operation) == kind


def test_the_sides_are_measured_in_turn():
    order = []

    def run(side: str, seconds: float) -> float:
        order.append(side)
        return seconds

    stock, ours = in_turn(lambda: run("stock", 3.0), lambda: run("ours", 2.0), repeats=2)
    assert order == ["stock", "ours"] * 3  # once to warm up
    assert stock == Samples((3.0, 3.0)) and ours == Samples((2.0, 2.0))
    order.clear()
    runs = [lambda side=side: run(side, 1.0) for side in ("exact", "one mode", "another")]
    assert in_rounds(runs, repeats=2) == [Samples((1.0, 1.0))] * 3
    assert order == ["exact", "one mode", "another"] * 2


def test_the_table_gives_medians_and_their_ratio():
    rows = [
        Row("stage 1: a", Samples((9.0, 3.0, 4.0)), Samples((2.0, 2.5, 1.0)), 1.5e-6),
        Row("stage 1: b", Missing("why not"), Samples((1.0,), "MiB")),
    ]
    found = cells_of(table(rows, "fp32", "bf16"))
    assert found["stage 1: a"] == ["4 (3-9) s", "2 (1-2.5) s", "2.00", "1.5e-06"]
    assert found["stage 1: b"] == ["- (why not)", "1 (1-1) MiB", "-", "-"]
    own = [
        OwnRow("stage 1: a", Samples((3.0,)), Samples((2.0,)), 0.25, 41.26),
        OwnRow("stage 1: b", Samples((3.0,)), Missing("why not")),
    ]
    found = cells_of(own_table(own, "title", "fp32", "bf16"))
    assert found["stage 1: a"] == ["3 (3-3) s", "2 (2-2) s", "1.50", "2.5e-01", "41.3"]
    assert found["stage 1: b"] == ["3 (3-3) s", "- (why not)", "-", "-", "-"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repeats", "0"], ["--steps", "0"], ["--rows", "step,speed"], ["--device", "abacus"],
        ["--size", "large"],
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_options_are_described():
    text = build_parser().format_help()
    for option in ("--size", "--device", "--precision", "--stage", "--repeats", "--markdown", "--profile"):
        assert option in text
    assert build_parser().parse_args(["--rows", "all"]).rows == KINDS == (*STOCK_KINDS, *OWN_KINDS, "length")
