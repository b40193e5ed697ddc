"""The studio without a browser: its queue, its words, its controls, its work, and its server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import requests
from sample_videos import moving_frames

import modelscope_i2v
from modelscope_i2v.cli import main
from modelscope_i2v.errors import Interrupted, InvalidInputError
from modelscope_i2v.media.video import read_metadata, read_video, video_bytes
from modelscope_i2v.settings.record import from_metadata
from modelscope_i2v.settings.stages import IMAGE_TO_VIDEO, VIDEO_TO_VIDEO
from modelscope_i2v.studio import words, work
from modelscope_i2v.studio.controls import default_of, keywords_of_page, page_settings
from modelscope_i2v.studio.jobs import Jobs, NoPlaceError
from modelscope_i2v.studio.models import Models
from modelscope_i2v.studio.watching import Watched

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "studio.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models(small_model) -> Models:
    return Models(*small_model, device="cpu")


# The queue


def test_jobs_run_one_at_a_time_in_the_order_of_their_coming():
    jobs, order, gate = Jobs(places=3), [], threading.Event()

    def task(name):
        return lambda progress: (gate.wait(10), order.append(name))

    entered = [jobs.enter(name, task(name)) for name in "abc"]
    assert [jobs.ahead(job) for job in entered] == [0, 1, 2]
    with pytest.raises(NoPlaceError, match="busy"):
        jobs.enter("a", task("a again"))
    with pytest.raises(NoPlaceError, match="full"):
        jobs.enter("d", task("d"))
    gate.set()
    for job in entered:
        job.future.result(10)
    assert order == ["a", "b", "c"]
    jobs.enter("a", task("a again")).future.result(10)
    jobs.close()


def test_a_job_that_waits_is_stopped_at_once_and_frees_its_place():
    jobs, gate = Jobs(places=2), threading.Event()
    running = jobs.enter("a", lambda progress: gate.wait(10))
    waiting = jobs.enter("b", lambda progress: pytest.fail("it was stopped"))
    following = jobs.follow(waiting)
    assert next(following) == 1
    following.close()  # as Gradio does when a page is closed
    with pytest.raises(CancelledError):
        waiting.future.result(1)
    again = jobs.enter("b", lambda progress: "done")
    gate.set()
    assert running.future.result(10) and again.future.result(10) == "done"
    jobs.close()


def test_a_running_generation_stops_within_a_step(models, picture):
    progress = Watched()
    stage = models.first(progress)
    seen = []

    def stop(step, timestep, x):
        seen.append(step)
        progress.stop()
        return Watched._after_step(progress, step, timestep, x)

    progress.callback = stop
    with pytest.raises(Interrupted, match="after step 1 of 8"):
        stage(str(picture), steps=8, progress=progress)
    assert seen == [0]


def test_a_watched_generation_tells_phase_step_picture_and_time(models, picture):
    progress, seen = Watched(), []
    stage = models.first(progress)
    after_step = progress.callback

    def look(step, timestep, x):
        after_step(step, timestep, x)
        seen.append((progress.now, progress.step, progress.total, progress.seconds_left))

    progress.callback = look
    stage(str(picture), steps=3, progress=progress)
    assert [each[:3] for each in seen] == [("denoising", 1, 3), ("denoising", 2, 3), ("denoising", 3, 3)]
    assert seen[0][3] > 0 == seen[2][3]
    assert progress.picture.startswith("data:image/jpeg;base64,")


# Words and controls


def test_every_control_has_words_in_both_languages():
    settings = [each for stage in (IMAGE_TO_VIDEO, VIDEO_TO_VIDEO) for each in page_settings(stage)]
    texts = words.translations(settings)
    assert texts["en"].keys() == texts["zh"].keys() and texts["zh"] == texts["zh-CN"]
    for key, english in texts["en"].items():
        assert english and texts["zh"][key]
        assert english.count("{}") == texts["zh"][key].count("{}"), key
    assert texts["en"]["scale_help"] == "size of the video as so many times its source's"


@pytest.mark.parametrize("stage", [IMAGE_TO_VIDEO, VIDEO_TO_VIDEO])
def test_an_untouched_page_asks_for_what_the_model_does_by_itself(models, stage):
    settings = models.settings[stage]
    defaults = [default_of(each, settings) for each in page_settings(stage)]
    empty = ["" if value is None else value for value in defaults]
    progress = Watched()
    loaded = models.first(progress) if stage == IMAGE_TO_VIDEO else models.second(progress)
    asked, _ = loaded.resolve(keywords_of_page(stage, page_settings(stage), empty))
    assert asked == loaded.resolve({})[0]


def test_controls_give_what_a_call_would_take():
    settings = [each for each in page_settings(VIDEO_TO_VIDEO) if each.name in ("scale", "resolution")]
    assert keywords_of_page(VIDEO_TO_VIDEO, settings, ["1.5", ""]) == {"scale": 1.5}
    assert keywords_of_page(VIDEO_TO_VIDEO, settings, ["", "640x360"]) == {"resolution": (640, 360)}
    for values, message in ((["big", ""], "scale: got 'big'"), (["", "64"], "as 448x256")):
        with pytest.raises(InvalidInputError, match=message):
            keywords_of_page(VIDEO_TO_VIDEO, settings, values)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("no file '/srv/my models/a/b.pth' here", "no file 'b.pth' here"),
        ("cannot read /tmp/x/y.png: it is a text", "cannot read y.png: it is a text"),
        ("C:\\Users\\me\\x.png is damaged", "x.png is damaged"),
        ("2 / 3 and https://host/a/b stay", "2 / 3 and https://host/a/b stay"),
    ],
)
def test_messages_name_no_folder_of_the_server(text, shown):
    assert words.without_folders(text) == shown


def test_errors_that_are_ours_are_reported_and_not_shown():
    reported = []
    error = KeyError("/secret")
    shown = words.error_words(error, words.ENGLISH, reported.append)
    assert shown == words.words("unexpected", words.ENGLISH) and reported == [error]
    assert "内存" in words.error_words(MemoryError(), words.language_of("zh-CN,zh;q=0.9"), reported.append)


# Work


def test_a_video_is_made_again_from_its_own_file(models, picture, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    first = Watched(2)
    work.try_seeds(models, str(picture), [4, 5], {"steps": 2}, tmp_path / "a", first)
    assert [Path(path).name for path in first.made] == ["seed_4.mp4", "seed_5.mp4"]
    work.refine(models, first.made[1], {"text": "a cat", "steps": 3}, tmp_path / "a", first)
    entries = from_metadata(read_metadata(first.made[2]))
    assert (entries["seed"], entries["text"], entries["first_stage"]["seed"]) == (5, "a cat", 5)

    again = Watched()
    work.make_again(models, first.made[2], str(picture), tmp_path / "b", again)
    assert [Path(path).read_bytes() for path in again.made] == [
        Path(path).read_bytes() for path in first.made[1:]
    ]


def test_a_file_names_no_adapter_of_the_server(models, picture, tmp_path):
    metadata = {
        "software": "modelscope_i2v 1",
        "stage": IMAGE_TO_VIDEO,
        "seed": "1",
        "lora": '["/etc/passwd"]',
    }
    made = tmp_path / "made.mp4"
    made.write_bytes(video_bytes(moving_frames(2, 16, 16), metadata=metadata))
    with pytest.raises(InvalidInputError, match="adapters"):
        work.make_again(models, str(made), str(picture), tmp_path, Watched())


def test_seeds_are_in_a_row_and_refused_in_words():
    assert work.seeds_from("7", 3) == [7, 8, 9]
    assert len(set(work.seeds_from("", 4))) == 4
    for first, count in (("x", 1), ("-1", 1), ("1", 5), ("1", None)):
        with pytest.raises(InvalidInputError, match="allowed is a whole number"):
            work.seeds_from(first, count)


# The server


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    """The URL of a page, and the folder of its files."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install '.[studio]'")
    import tempfile

    from modelscope_i2v.studio.server import serving

    parent, before = tmp_path_factory.mktemp("served"), tempfile.tempdir
    tempfile.tempdir = str(parent)
    try:
        with serving(models, port=free_port()) as url:
            yield url.rstrip("/"), parent
        assert list(parent.glob("i2v-studio-*")) == []  # the client beside it has folders, too
    finally:
        tempfile.tempdir = before


def free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client

    return Client(served[0], verbose=False)


def test_a_program_makes_a_video_of_a_picture(client, picture):
    from gradio_client import handle_file

    video = client.predict(handle_file(str(picture)), 7, True, "a cat", api_name="/make")
    entries = from_metadata(read_metadata(video))
    assert (entries["stage"], entries["seed"], entries["text"]) == (VIDEO_TO_VIDEO, 7, "a cat")
    assert read_video(video).frames.shape == (4, 80, 128, 3)


def test_the_documents_python_and_curl_work(served, picture, tmp_path, monkeypatch):
    (tmp_path / "cat.jpg").write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    section = DOCUMENT.split("## From a program")[1].replace("http://127.0.0.1:7860", served[0])
    python, shell = re.findall(r"```(?:python|sh)\n(.*?)```", section, re.DOTALL)
    names: dict = {}
    exec(python, names)
    subprocess.run(["bash", "-euc", shell], check=True, cwd=tmp_path)
    assert (tmp_path / "cat.mp4").read_bytes() == Path(names["video"]).read_bytes()


def test_what_cannot_be_used_is_said_in_words_without_a_path(client, served, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    for picture, seed, message in (
        (handle_file(str(text)), 1, "the image 'notes.txt' cannot be read: it seems to be a text"),
        (None, 1, "Give a picture first."),
    ):
        with pytest.raises(AppError) as raised:
            client.predict(picture, seed, False, "", api_name="/make")
        assert message in str(raised.value) and str(served[1]) not in str(raised.value)


def test_nobody_can_name_a_file_of_the_server(served):
    url, folder = served
    secret = folder / "secret.png"
    secret.write_bytes(b"secret")
    try:
        for path in ("/etc/passwd", secret, folder / "x" / ".." / "secret.png"):
            assert requests.get(f"{url}/gradio_api/file={path}", timeout=30).status_code in (403, 404)
            picture = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            data = {"data": [picture, 1, False, ""]}
            event = requests.post(f"{url}/gradio_api/call/make", json=data, timeout=30).json()["event_id"]
            answer = requests.get(f"{url}/gradio_api/call/make/{event}", timeout=60).text
            assert "event: error" in answer and "secret" not in answer and "root:" not in answer
    finally:
        secret.unlink()


def test_an_upload_that_is_too_large_is_refused(served):
    from modelscope_i2v.studio import server

    megabytes = int(server.MAX_UPLOAD.removesuffix("mb"))
    large = {"files": ("large.png", b"\0" * (megabytes + 1) * 2**20)}
    answer = requests.post(f"{served[0]}/gradio_api/upload", files=large, timeout=120)
    assert answer.status_code == 413
    assert not [path for path in served[1].rglob("*") if path.is_file() and path.stat().st_size > 2**20]


def test_generations_leave_no_files_but_those_that_are_served(client, served, picture):
    from gradio_client import handle_file

    client.predict(handle_file(str(picture)), 8, False, "", api_name="/make")
    (root,) = served[1].glob("i2v-studio-*")
    assert list((root / "files").iterdir()) == []


# The command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--port", "0"], "--port: got 0"),
        (["--queue", "0"], "--queue: got 0"),
        (["--model", "no/where/at/all"], "there is no folder 'no/where/at/all'"),
        (["--auth", ":x"], "--auth: a user's name and a password are needed"),
    ],
)
def test_the_command_refuses_in_words(arguments, words, capsys):
    assert main(["studio", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_default_model_ships_with_the_package():
    models = Models(Path(modelscope_i2v.__file__).parent / "assets" / "small_model")
    assert IMAGE_TO_VIDEO in models.settings


def test_the_page_asks_for_a_password_where_it_is_told_to(models, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install '.[studio]'")
    from modelscope_i2v.studio.server import serving

    with serving(models, port=free_port(), auth=("me", "secret")) as url:
        config = f"{url}config"
        assert requests.get(config, timeout=30).status_code == 401
        session = requests.Session()
        login = session.post(f"{url}login", data={"username": "me", "password": "secret"}, timeout=30)
        assert login.ok and session.get(config, timeout=30).ok


@pytest.mark.slow
def test_the_example_for_modelscopes_studios_serves_and_ends(tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install '.[studio]'")
    port = free_port()
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    app = ROOT / "examples" / "studio" / "app.py"
    process = subprocess.Popen([sys.executable, str(app)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert "--auth" in process.stdout.readline()
        assert str(port) in process.stdout.readline()
        page = requests.get(f"http://127.0.0.1:{port}/", timeout=60)
        assert page.ok and "fonts.googleapis" not in page.text
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert list(tmp_path.glob("i2v-studio-*")) == []


def test_the_example_asks_for_this_version():
    requirement = (ROOT / "examples" / "studio" / "requirements.txt").read_text().strip()
    assert requirement == f"./modelscope_i2v-{modelscope_i2v.__version__}-py3-none-any.whl[studio]"
    settings = json.loads((ROOT / "examples" / "studio" / "ms_deploy.json").read_text())
    assert settings["sdk_type"] == "gradio" and settings["sdk_version"].startswith("6.")
