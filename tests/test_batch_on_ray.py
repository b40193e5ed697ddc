"""Batches on a Ray cluster of this machine: the same files as here, whoever dies."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from test_batch import files, lines, picture, results, started, tiny_models, twelve_items, wait_for

from modelscope_i2v.batch.items import read_items
from modelscope_i2v.batch.making import Options
from modelscope_i2v.batch.ray_workers import connected, ray_workers
from modelscope_i2v.batch.running import run_batch
from modelscope_i2v.cli import main
from modelscope_i2v.errors import CheckpointError, InvalidInputError

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (extra ray)"
)


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with room for two workers of one CPU."""
    with connected() as ray:
        yield ray


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)  # four starts of a worker, three of a cluster
def test_a_killed_driver_and_a_killed_worker_lose_nothing_and_make_nothing_twice(tmp_path, small_model):
    twelve, models = twelve_items(tmp_path), tiny_models(small_model)
    quiet, out = tmp_path / "quiet", tmp_path / "out"
    run_batch(read_items([twelve], str(quiet)), quiet, models)
    arguments = [twelve, "-o", str(out), "--model", str(small_model[0]), "--device", "cpu"]
    process = started([*arguments, "--ray", "--workers", "2", "--cpus", "1"])
    wait_for(lambda: lines(out) >= 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    makers: list[int] = []
    killed: list[int] = []

    def report(entry, made):
        if "seed" not in entry or not made:
            return
        pid = int(entry["process"].rpartition(":")[2])
        makers.append(pid)
        others = [each for each in makers if each != pid]
        if others and not killed:  # which is in the middle of an item
            killed.append(others[-1])
            os.kill(others[-1], signal.SIGKILL)

    with connected() as ray:
        workers = ray_workers(ray, out, models, Options(), count=2, cpus=1)
        items = read_items([twelve], str(out))
        counts = run_batch(items, out, models, report=report, workers=workers)
    assert killed and os.getpid() not in makers
    assert counts.made == len(makers) and counts.failed == 2
    assert files(out) == files(quiet)
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
    found = results(out)
    assert sorted(name for name, entry in found.items() if "error" in entry) == ["05.mp4", "07.mp4"]
    assert "it seems to be a text" in found["07.mp4"]["error"]


@needs_ray
@pytest.mark.slow
def test_what_workers_cannot_do_is_an_error_here(cluster, tmp_path, small_model):
    models = tiny_models(small_model)
    with pytest.raises(InvalidInputError, match="cpus: got 4096, but no node of the cluster has more than"):
        ray_workers(cluster, tmp_path, models, Options(), cpus=4096)
    items = read_items([picture(tmp_path / "a.png", 1)], str(tmp_path / "out"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(small_model[0]).iterdir():
        (broken / path.name).write_bytes(path.read_bytes() if path.suffix == ".json" else b"")
    models.folders["image-to-video"] = str(broken)  # type: ignore[index]
    workers = ray_workers(cluster, tmp_path / "out", models, Options(), count=1, cpus=1)
    with pytest.raises(CheckpointError, match="is empty"):
        run_batch(items, tmp_path / "out", models, workers=workers)


@needs_ray
@pytest.mark.slow
def test_an_item_that_kills_every_worker_is_a_failure(cluster, tmp_path, small_model, monkeypatch):
    monkeypatch.setattr("modelscope_i2v.batch.ray_workers._Actor.make", lambda self, task: os._exit(1))
    monkeypatch.setattr("modelscope_i2v.batch.ray_workers.RETRIES", 1)
    items = read_items([picture(tmp_path / "a.png", 1)], str(tmp_path / "out"))
    models = tiny_models(small_model)
    workers = ray_workers(cluster, tmp_path / "out", models, Options(), count=1, cpus=1)
    assert run_batch(items, tmp_path / "out", models, workers=workers).failed == 1
    assert "its worker died, at 2 tries" in results(tmp_path / "out")["a.mp4"]["error"]


@needs_ray
def test_an_address_that_answers_nothing_is_refused_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(InvalidInputError, match=f"nothing answers at '{address}'"), connected(address):
            pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "2"], "--workers is for --ray"),
        (["--ray", "--cpus", "0"], "--cpus: got 0"),
        (["--ray", "--device", "cuda:1"], "--device: got 'cuda:1', allowed with --ray is cpu"),
    ],
)
def test_wrong_flags(options, words, capsys, tmp_path):
    assert main(["batch", "a.png", "-o", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(monkeypatch, capsys, tmp_path, small_model):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["batch", picture(tmp_path / "a.png", 1), "-o", str(tmp_path / "out"), "--ray"]
    assert main([*command, "--model", str(small_model[0])]) == 2
    assert "pip install 'modelscope_i2v[ray]'" in capsys.readouterr().err
