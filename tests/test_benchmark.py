"""``scripts/benchmark.py``: every row has a number or a reason, and what does not agree is not compared."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

from benchmarking import cases, rows, stock  # noqa: E402
from benchmarking.measuring import Missing, Row, Samples, in_fresh_process, in_turn  # noqa: E402
from benchmarking.sides import Ours, window_count  # noqa: E402

benchmark = runpy.run_path(str(SCRIPTS / "benchmark.py"), run_name="benchmark")
CPU = torch.device("cpu")
ON_CPU = ("--size", "tiny", "--device", "cpu", "--repeats", "1", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What ``--folder`` is given; the weights of size tiny are in it."""
    root = tmp_path_factory.mktemp("benchmark")
    cases.write_configuration(root / "tiny", cases.SIZES["tiny"])
    assert not any(cases.prepare(root / "tiny", stage, CPU) for stage in (1, 2))
    return root


@pytest.fixture(scope="module")
def sides(folder) -> dict[int, tuple[stock.Stock, Ours]]:
    """Both sides of each stage, in float32."""
    drawn = {stage: cases.draw_case(folder / "tiny", stage) for stage in (1, 2)}
    return {
        stage: (stock.Stock(folder / "tiny", case, CPU), Ours(folder / "tiny", case, CPU, "fp32"))
        for stage, case in drawn.items()
    }


@pytest.fixture
def run(folder, capsys):
    """Run the benchmark; its exit status, and the cells of its tables' lines, by the first."""

    def run(*arguments: str) -> tuple[int, dict[str, list[str]]]:
        status = benchmark["main"]([*ON_CPU, "--folder", str(folder), *arguments])
        lines = [
            line for line in capsys.readouterr().out.splitlines() if " stage" in line[:12] and "|" in line
        ]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return status, {first: rest for first, *rest in cells if first.startswith(("stage", "both"))}

    return run


@pytest.fixture
def loaded(sides, monkeypatch):
    """The benchmark takes the sides that are loaded already."""
    monkeypatch.setattr(rows, "Stock", lambda folder, case, device: sides[case.stage][0])
    monkeypatch.setattr(rows, "Ours", lambda folder, case, *_: sides[case.stage][1])


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_each_row_has_numbers(run, monkeypatch):
    monkeypatch.setattr(rows, "in_fresh_process", lambda function, *given: function(*given))  # sooner
    kinds = "step,decode,stage,memory,approximate,length"
    status, found = run("--stage", "1", "--precision", "fp32", "--rows", kinds, "--steps", "2")
    assert status == 0
    for name in ("one guided step", "VAE decode", "whole, 2 steps"):
        first, second, ratio, difference, *_ = found.pop(f"stage 1: {name}")
        assert first.endswith(" s") and second.endswith(" s")
        assert float(ratio) > 0 and float(difference) < rows.TOLERANCE
    assert found.pop("stage 1: peak device memory")[:2] == ["- (needs a CUDA device)"] * 2
    lengths = [found.pop(f"stage 1: {frames} frames") for frames in (2, 4, 8)]
    assert [line[0] for line in lengths] == ["1", "2", "4"]
    assert all(line[1].endswith(" s") and line[4].endswith(" MiB") for line in lengths)
    assert len(found) == 5  # approximate modes
    for name, (first, second, ratio, *_) in found.items():
        assert first.endswith(" s") and second.endswith(" s") and float(ratio) > 0, name
    _, found = run("--stage", "1", "--precision", "fp32", "--rows", "precision")
    assert found["stage 1: whole, 2 steps"][0].startswith("- (--precision fp32 is fp32 here")


@pytest.mark.slow
def test_training_is_measured(run, monkeypatch):
    monkeypatch.setattr(rows, "in_fresh_process", lambda function, *given: function(*given))  # sooner
    status, found = run("--stage", "1", "--precision", "fp32", "--rows", "training")
    assert status == 0
    for name in ("LoRA", "LoRA, checkpointing", "all weights", "all weights, checkpointing"):
        took, held = found.pop(f"stage 1: {name}")
        assert took.endswith(" s") and held.endswith(" MiB"), name
    computed, read = (float(cells[0].split()[0]) for cells in found.values())
    assert computed > read


@pytest.mark.slow
def test_loading_is_measured(run, monkeypatch):
    monkeypatch.setattr(rows, "in_fresh_process", lambda function, *given: function(*given))  # sooner
    status, found = run("--stage", "1", "--precision", "fp32", "--rows", "loading")
    assert status == 0 and len(found) == 3
    seconds, _, weights = found.values()
    assert seconds[0].endswith(" s") and float(seconds[2]) > 1
    assert weights[1].endswith(" MiB") and float(weights[2]) > 1  # one of CLIP's towers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "network", "name"),
    [
        (1, "step", "generator", "input_blocks.1.0.temopral_conv.conv4.3.weight"),
        (2, "step", "generator", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"),
        (2, "encode", "autoencoder", "encoder.down.1.block.0.norm1.bias"),
        (1, "stage", "clip_encoder", "model.visual.proj"),
    ],
)
def test_a_changed_weight_is_noticed(sides, stage, kind, network, name):
    stocks, ours = sides[stage]
    weight = getattr(stocks, network).get_parameter(name).data
    original = weight.clone()
    weight.mul_(1.01).add_(0.01)
    with pytest.raises(rows.DisagreementError, match=f"{kind}: the outputs of the two sides differ"):
        rows.compare(stocks, ours, [kind])
    weight.copy_(original)
    assert rows.compare(stocks, ours, [kind])[kind] < rows.TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_a_disagreement_ends_the_benchmark(run, monkeypatch):
    monkeypatch.setattr(rows, "TOLERANCE", 0.0)
    assert run("--stage", "1", "--rows", "decode", "--precision", "fp32") == (1, {})


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_without_the_stock_ours_is_measured_alone(run, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'stock'")

    monkeypatch.setattr(stock, "import_stock", missing)
    monkeypatch.setattr(rows, "Stock", stock.Stock)
    status, found = run("--stage", "2", "--rows", "encode")
    first, second, ratio, difference = found["stage 2: VAE encode"]
    assert status == 0 and "No module named 'stock'" in first and second.endswith(" s")
    assert ratio == difference == "-"


@pytest.mark.slow
def test_what_a_machine_has_not_is_a_reason(run, folder, monkeypatch, tmp_path):
    def fail(*_):
        raise MemoryError("out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(rows, "Ours", fail)
    status, found = run("--stage", "1", "--rows", "step,approximate")
    assert status == 0 and len(found) == 7
    assert all(line[:2] == ["- (out of memory)"] * 2 for line in found.values())
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    cases.write_configuration(tmp_path, cases.SIZES["tiny"])
    assert "its files need 0.4 GB of disk, 0.0 GB are free" in cases.prepare(tmp_path, 1, CPU)
    assert cases.prepare(folder / "tiny", 1, CPU) == ""  # they are there already


def test_the_stand_ins_are_taken_away_again():
    held = (
        "xformers",
        "fairscale",
        "rotary_embedding_torch",
        "modelscope.models.multi_modal.image_to_video.",
    )

    def left() -> dict[str, object]:
        return {name: module for name, module in sys.modules.items() if name.startswith(held)}

    before = left()
    with pytest.raises(ZeroDivisionError), stock.stand_ins(CPU) as names:
        import modelscope.models.multi_modal.image_to_video.modules  # noqa: F401

        assert set(names) <= set(held) and len(left()) > len(before)
        _ = 1 / 0
    assert left() == before


def test_the_sides_are_measured_in_turn_and_the_table_gives_medians():
    order = []
    runs = [lambda side=side: order.append(side) or float(len(order)) for side in ("stock", "ours")]
    first, second = in_turn(runs, 3)
    assert order == ["stock", "ours"] * 3 and first == Samples((1.0, 3.0, 5.0))
    found = [Row("a", first, second, 1.5e-6, 41.26), Row("b", Missing("why not"), Samples((1.0,), "MiB"))]
    _, _, *lines = benchmark["table"](["", "stock", "ours", "ratio"], found).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["a", "3 (1-5) s", "4 (2-6) s", "0.75", "1.5e-06", "41.3"],
        ["b", "- (why not)", "1 (1-1) MiB", "-", "-", "-"],
    ]


def test_videos_are_compared_as_they_are_shown():
    video = torch.zeros(1, 3, 2, 4, 4)
    assert rows.psnr(video + 0.2, video) == pytest.approx(20)
    assert rows.psnr(video + 1.5, video + 1) == float("inf")  # both are white


@pytest.mark.parametrize(("frames", "count"), [(32, 1), (33, 2), (64, 3), (128, 5), (1024, 43)])
def test_windows_are_as_many_as_the_overlap_makes_them(frames, count):
    assert window_count(frames, 32) == count


@pytest.mark.slow
def test_a_failed_process_is_a_reason():
    reason = in_fresh_process(int, "three")
    assert isinstance(reason, Missing) and "invalid literal" in reason


@pytest.mark.parametrize(
    "arguments",
    [["--repeats", "0"], ["--rows", "step,speed"], ["--device", "abacus"], ["--size", "large"]],
)
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark["main"](arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err
