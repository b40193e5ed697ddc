"""The studio in a real browser: Chromium, headless, on the tiny model.

Screenshots are kept in the folder that SCREENSHOTS names.
"""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path

import pytest
from test_studio import free_port

from modelscope_i2v.media.video import read_metadata
from modelscope_i2v.settings.record import from_metadata
from modelscope_i2v.studio.models import SMALL_MODEL, Models

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium"),
]
#: Milliseconds that a page may take for anything, on a machine that has other work.
PATIENCE = 120_000


@pytest.fixture(scope="module")
def served(small_model):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install '.[studio]'")
    from modelscope_i2v.studio.server import serving

    with serving(Models(*small_model, device="cpu"), port=free_port(), places=2) as url:
        yield url


@pytest.fixture
def with_the_model_that_ships():
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install '.[studio]'")
    from modelscope_i2v.studio.server import serving

    models = Models(SMALL_MODEL, device="cpu")
    with serving(models, port=free_port()) as url:
        yield url, models


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(served, browser, tmp_path):
    """Open a page in a window of its own; whatever it asks for must come from its own server."""
    contexts, elsewhere = [], []

    def open_page(url=served, **options):
        options = {"viewport": {"width": 1280, "height": 1000}, "locale": "en-US", **options}
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(url)
        page.wait_for_selector("#try")
        return page

    yield open_page
    for context in contexts:
        context.close()
    allowed = ("http://127.0.0.1:", "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(allowed)] == []


@pytest.fixture
def keep(request, tmp_path):
    """Keep a screenshot of a whole page."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name, **options: page.screenshot(
        path=folder / f"{name}.png", **{"full_page": True, **options}
    )


def upload(page, place: str, path: Path) -> None:
    page.set_input_files(f"#{place} input[type=file]", str(path))


def drop(page, place: str, path: Path) -> None:
    """Drop a file from outside the browser."""
    content = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([content, name, type]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), each => each.charCodeAt(0));
            transfer.items.add(new File([bytes], name, {type}));
            return transfer;
        }""",
        [content, path.name, "video/mp4"],
    )
    page.dispatch_event(f"#{place} button:has(input[type=file])", "drop", {"dataTransfer": transfer})


def says(page, text: str) -> None:
    """Wait for what the status says."""
    page.locator("#status", has_text=text).wait_for()


def plays(page, place: str) -> None:
    """Wait until a video plays."""
    video = f"document.querySelector('#{place} video')"
    page.wait_for_function(f"{video} && {video}.readyState >= 2 && {video}.currentTime > 0")


def test_from_a_picture_to_a_refined_video_and_again(opened, keep, picture, tmp_path):
    page = opened()
    upload(page, "picture", picture)
    page.locator("#picture img").wait_for()
    page.fill("#seed input, #seed textarea", "7")
    page.click("#try")
    page.locator("#status progress").wait_for()
    keep(page, "working")
    says(page, "Done in")
    plays(page, "try1")
    page.click("#choose1")
    plays(page, "chosen")
    page.get_by_label("Text").locator("visible=true").fill("a cat")
    page.click("#refine")
    page.locator("#status progress").wait_for()
    says(page, "Done in")
    plays(page, "result")
    keep(page, "refined")
    with page.expect_download() as download:
        page.click("#download")
    video = tmp_path / "refined_8.mp4"
    download.value.save_as(video)
    entries = from_metadata(read_metadata(str(video)))
    assert (entries["seed"], entries["text"], entries["first_stage"]["seed"]) == (8, "a cat", 8)

    page.get_by_role("tab", name="How it was made").click()
    drop(page, "made", video)
    page.locator("#made_record", has_text="a cat").wait_for()
    upload(page, "its_picture", picture)
    page.locator("#its_picture img").wait_for()
    page.click("#again")
    page.locator("#status progress").wait_for()
    says(page, "Done in")
    plays(page, "result")
    keep(page, "made_again")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "again.mp4")
    assert (tmp_path / "again.mp4").read_bytes() == video.read_bytes()


def test_a_long_job_is_cancelled_by_the_button_and_by_leaving_the_page(opened, keep, picture):
    page = opened()

    def begin(steps: str) -> None:
        upload(page, "picture", picture)
        page.locator("#picture img").wait_for()
        page.get_by_role("button", name="Advanced settings", exact=False).first.click()
        field = page.get_by_role("spinbutton", name="Steps").locator("visible=true")
        field.fill(steps)
        field.press("Tab")
        page.click("#try")

    begin("500")
    says(page, "of 500")
    page.locator("#status img").wait_for()  # the picture of the estimate
    assert page.locator("#try").is_disabled()
    keep(page, "denoising")
    page.click("#cancel")
    says(page, "Cancelled.")
    page.click("#try")
    says(page, "of 500")
    page.reload()
    page.wait_for_selector("#try")
    begin("1")  # which would wait for hours, were the other still there
    says(page, "Done in")


def test_what_is_wrong_is_said_in_words_and_the_page_goes_on(opened, keep, picture, tmp_path):
    page = opened()
    alert = page.locator("#status [role=alert]")
    page.click("#try")
    alert.filter(has_text="Give a picture first.").wait_for()
    damaged = tmp_path / "damaged.png"
    damaged.write_text("this is no picture")
    upload(page, "picture", damaged)
    page.locator("#picture img").wait_for(state="attached")
    page.click("#try")
    alert.filter(has_text="'damaged.png' cannot be read: it seems to be a text").wait_for()
    assert page.locator("#try").is_enabled()
    keep(page, "error")
    page.get_by_role("tab", name="From a video").click()
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    upload(page, "video", empty)
    page.locator("#video video").wait_for(state="attached")
    page.click("#enhance")
    alert.filter(has_text="empty.mp4").wait_for()
    assert "/" not in alert.inner_text()


def test_a_narrow_dark_chinese_page_by_keyboard_alone(opened, keep):
    page = opened(viewport={"width": 390, "height": 844}, locale="zh-CN", color_scheme="dark")
    page.get_by_role("button", name="尝试种子").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    colour = page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    assert sum(map(int, colour.strip("rgba()").split(",")[:3])) < 200
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "try":
            break
    assert page.evaluate("document.activeElement.id") == "try"
    page.keyboard.press("Enter")
    page.locator("#status [role=alert]", has_text="请先提供图片").wait_for()
    keep(page, "narrow_dark_chinese")


def test_an_example_becomes_a_video_on_the_model_that_ships(with_the_model_that_ships, opened, keep):
    url, models = with_the_model_that_ships
    page = opened(url, viewport={"width": 1100, "height": 1620})
    page.locator("#examples img").first.click()
    page.locator("#picture img").wait_for()
    page.click("#try")
    says(page, "Done in")
    plays(page, "try1")
    page.click("#choose0")
    plays(page, "chosen")
    if models.has_second_stage:
        page.click("#refine")
        page.locator("#status progress").wait_for()
        says(page, "Done in")
        plays(page, "result")
    page.keyboard.press("Control+Home")
    keep(page, "studio", full_page=False)  # docs/studio.png
