"""The page: what is on it, and what its buttons start."""

from __future__ import annotations

import html
import importlib
import logging
import tempfile
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

from ..engine.enhancement import DEFAULT_SCALE, DEFAULTS
from ..errors import I2VError, Interrupted, InvalidInputError, OutputError
from ..media.video import read_metadata
from ..settings.record import FIRST_STAGE, from_metadata
from ..settings.stages import IMAGE_TO_VIDEO, VIDEO_TO_VIDEO, Setting
from . import work
from .controls import MAIN, component, default_of, keywords_of_page, page_settings
from .jobs import Job, Jobs
from .models import Models
from .watching import Watched
from .words import ENGLISH, error_words, language_of, translations, words

if TYPE_CHECKING:
    import gradio as gr
else:

    class _Gradio:
        """Gradio, imported when it is first used: this module is imported without it, too."""

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("gradio"), name)

    gr = _Gradio()

logger = logging.getLogger(__name__)

#: Scenes such as the model that ships knows.
EXAMPLES = sorted((Path(__file__).parents[1] / "assets" / "scenes").glob("*.png"))
#: Seconds between two looks for files of uploads and results to remove, and the age at which they are.
_DELETE_CACHE = (600, 7200)
_CSS = """
.gradio-container { padding-bottom: 8rem; }
.status { position: fixed; bottom: 0; left: 0; right: 0; z-index: 1000; padding: .6rem 2rem;
  background: var(--body-background-fill); border-top: 1px solid var(--border-color-primary); }
.status progress { appearance: auto; accent-color: var(--primary-500); width: 100%; height: 1rem; }
.status img { height: 5rem; margin-top: .5rem; border-radius: .3rem; }
.status [role=alert] { font-weight: 600; border-left: .3rem solid #d33; padding-left: .6rem; }
.record td { padding: .1rem .6rem; vertical-align: top; overflow-wrap: anywhere; }
.record td:first-child { white-space: nowrap; }
"""

Updates = dict[Any, Any]


class Page:
    """The page of a studio.

    Args:
        models: what makes the videos.
        places: jobs that may wait or run at a time.
        folder: where files are made before they are served.

    Attributes:
        blocks: the page, to be launched with ``launch_options``.
    """

    def __init__(self, models: Models, places: int, folder: Path):
        self._models, self._folder = models, folder
        self.jobs = Jobs(places)
        self._settings = {stage: page_settings(stage) for stage in (IMAGE_TO_VIDEO, VIDEO_TO_VIDEO)}
        both = [each for settings in self._settings.values() for each in settings]
        self._i18n = gr.I18n(**translations(both))
        with gr.Blocks(
            title=words("title", ENGLISH), analytics_enabled=False, delete_cache=_DELETE_CACHE
        ) as self.blocks:
            self._lay_out()
        self.blocks.queue(default_concurrency_limit=None)

    @property
    def launch_options(self) -> dict[str, Any]:
        """Options of ``launch``: nothing from elsewhere, nothing to elsewhere."""
        theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        return {
            "i18n": self._i18n, "theme": theme, "css": _CSS, "share": False, "footer_links": ["api"],
            "ssr_mode": False, "pwa": False, "mcp_server": False, "enable_monitoring": False,
            "show_error": False, "inbrowser": False, "quiet": True,
        }  # fmt: skip

    # What is on it.

    def _lay_out(self) -> None:
        t = self._i18n
        gr.Markdown(t("heading"))
        with gr.Tabs():
            with gr.Tab(t("from_picture")):
                self._lay_out_from_picture()
            if self._models.has_second_stage:
                with gr.Tab(t("from_video")):
                    self._lay_out_from_video()
            with gr.Tab(t("from_file")):
                self._lay_out_from_file()
        with gr.Row(elem_classes="status", equal_height=True):
            self._status = gr.HTML(elem_id="status")
            self._cancel = gr.Button(
                t("cancel"), variant="stop", interactive=False, scale=0, elem_id="cancel"
            )
        with gr.Row():
            self._chosen = _player(t("before"), "chosen")
            self._result = _player(t("after"), "result")
        self._download = gr.DownloadButton(t("download"), interactive=False, elem_id="download")
        with gr.Accordion(t("record"), open=False):
            self._record = gr.HTML(elem_id="record")
        self._buttons = [self._try, *self._choose, self._again]
        if self._models.has_second_stage:
            self._buttons += [self._refine, self._enhance]
        self._connect()

    def _lay_out_from_picture(self) -> None:
        t = self._i18n
        with gr.Row():
            with gr.Column():
                self._picture = _picture(t("picture"), "picture")
                gr.Examples(
                    [[str(path)] for path in EXAMPLES], [self._picture], label=t("examples"),
                    elem_id="examples", api_visibility="private",
                )  # fmt: skip
            with gr.Column():
                self._count = gr.Slider(1, work.MOST_SEEDS, 2, step=1, label=t("seeds"), elem_id="seeds")
                self._seed = gr.Textbox(label=t("first_seed"), max_length=20, elem_id="seed")
                self._first = self._controls(IMAGE_TO_VIDEO)
                self._try = gr.Button(t("try"), variant="primary", elem_id="try")
        self._slots, self._videos, self._choose = [], [], []
        with gr.Row():
            for number in range(work.MOST_SEEDS):
                with gr.Column(visible=False, min_width=160) as slot:
                    self._videos.append(_player(None, f"try{number}"))
                    self._choose.append(gr.Button(t("choose"), elem_id=f"choose{number}"))
                self._slots.append(slot)
        if self._models.has_second_stage:
            self._second = self._controls(VIDEO_TO_VIDEO)
            self._refine = gr.Button(t("refine"), variant="primary", elem_id="refine")
        else:
            gr.Markdown(t("no_second"))

    def _lay_out_from_video(self) -> None:
        t = self._i18n
        with gr.Row():
            self._video = gr.Video(label=t("video"), sources=["upload"], interactive=True, elem_id="video")
            with gr.Column():
                self._enhanced = self._controls(VIDEO_TO_VIDEO, {**DEFAULTS, "scale": DEFAULT_SCALE})
                self._enhance = gr.Button(t("enhance"), variant="primary", elem_id="enhance")

    def _lay_out_from_file(self) -> None:
        t = self._i18n
        with gr.Row():
            self._made = gr.Video(label=t("made_video"), sources=["upload"], interactive=True, elem_id="made")
            self._its_picture = _picture(t("its_picture"), "its_picture")
        self._made_record = gr.HTML(elem_id="made_record")
        self._again = gr.Button(t("make_again"), variant="primary", elem_id="again")

    def _controls(self, stage: str, defaults: dict[str, Any] | None = None) -> list[Any]:
        """Lay out a stage's controls; stage two's main ones first, the others folded away."""
        settings, made = self._models.settings[stage], {}

        def add(each: Setting) -> None:
            default = (defaults or {}).get(each.name, default_of(each, settings))
            made[each.name] = component(each, default, self._i18n)

        main = [each for each in self._settings[stage] if stage == VIDEO_TO_VIDEO and each.name in MAIN]
        with gr.Row():
            for each in main:
                add(each)
        with gr.Accordion(
            self._i18n("advanced" if stage == IMAGE_TO_VIDEO else "advanced_second"), open=False
        ):
            with gr.Row():
                for each in self._settings[stage]:
                    if each not in main:
                        add(each)
        return [made[each.name] for each in self._settings[stage]]

    # What its buttons start.

    def _connect(self) -> None:
        outputs = [
            self._status, self._cancel, self._result, self._record, self._download, self._chosen,
            *self._buttons, *self._slots, *self._videos,
        ]  # fmt: skip
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        start: dict[str, Any] = {"outputs": outputs, "concurrency_limit": None, **private}
        self._try.click(self._on_try, [self._picture, self._count, self._seed, *self._first], **start)
        self._again.click(self._on_again, [self._made, self._its_picture], **start)
        if self._models.has_second_stage:
            self._refine.click(self._on_refine, [self._chosen, *self._second], **start)
            self._enhance.click(self._on_enhance, [self._video, *self._enhanced], **start)
        for button, video in zip(self._choose, self._videos):
            button.click(self._on_choose, video, [self._chosen, self._record], **private)
        self._made.change(self._on_made, self._made, self._made_record, **private)
        self._cancel.click(self._on_cancel, None, None, queue=False, **private)
        self.blocks.unload(self._on_cancel)
        self._connect_api()

    def _on_try(self, request: gr.Request, picture: str | None, count: Any, seed: Any, *values: Any) -> Any:
        def begin() -> tuple[Callable, int]:
            seeds = work.seeds_from(seed, count)
            keywords = self._keywords(IMAGE_TO_VIDEO, values)
            return partial(work.try_seeds, self._models, _needed(picture, "picture"), seeds, keywords), len(
                seeds
            )

        clear = {slot: gr.Column(visible=False) for slot in self._slots}
        yield from self._job(request, begin, self._tries, clear)

    def _on_choose(self, video: str) -> tuple[str, str]:
        return video, record_html(video)

    def _on_refine(self, request: gr.Request, video: str | None, *values: Any) -> Any:
        def begin() -> tuple[Callable, int]:
            keywords = self._keywords(VIDEO_TO_VIDEO, values)
            return partial(work.refine, self._models, _needed(video, "chosen"), keywords), 1

        yield from self._job(request, begin, self._results)

    def _on_enhance(self, request: gr.Request, video: str | None, *values: Any) -> Any:
        def begin() -> tuple[Callable, int]:
            keywords = self._keywords(VIDEO_TO_VIDEO, values)
            return partial(work.enhance, self._models, _needed(video, "video"), keywords), 1

        yield from self._job(request, begin, self._results, {self._chosen: video})

    def _on_again(self, request: gr.Request, made: str | None, picture: str | None) -> Any:
        def begin() -> tuple[Callable, int]:
            video = _needed(made, "made_video")
            return partial(work.make_again, self._models, video, _needed(picture, "picture")), 1

        yield from self._job(request, begin, self._results)

    def _on_made(self, request: gr.Request, made: str | None) -> str:
        try:
            return record_html(made) if made else ""
        except I2VError as error:
            return _alert(error_words(error, _language(request), _report))

    def _on_cancel(self, request: gr.Request) -> None:
        self.jobs.stop(_page_of(request))

    def _keywords(self, stage: str, values: tuple[Any, ...]) -> dict[str, Any]:
        return keywords_of_page(stage, self._settings[stage], values)

    def _tries(self, made: list[str]) -> Updates:
        """Show the seeds' videos that are complete."""
        updates: Updates = {}
        for slot, video, path in zip(self._slots, self._videos, made):
            updates[slot] = gr.Column(visible=True)
            updates[video] = gr.Video(path, label=Path(path).stem.replace("_", " "))
        return updates

    def _results(self, made: list[str]) -> Updates:
        """Show the last video that is complete as the result, and beside it the one that it was made of."""
        if not made:
            return {}
        first, last = {self._chosen: made[0]} if len(made) > 1 else {}, made[-1]
        download = gr.DownloadButton(value=last, interactive=True)
        return {**first, self._result: last, self._record: record_html(last), self._download: download}

    def _job(
        self,
        request: gr.Request,
        begin: Callable[[], tuple[Callable, int]],
        show: Callable[[list[str]], Updates],
        clear: Updates | None = None,
    ) -> Iterator[Updates]:
        """Yield what the page shows while a job waits, runs and ends.

        Args:
            request: of the page.
            begin: checks the input; returns the work, which takes a folder and a progress, and how many
                videos it makes.
            show: returns the updates that show complete files.
            clear: updates at the beginning.
        """
        language = _language(request)
        busy = {button: gr.Button(interactive=False) for button in self._buttons}
        yield {**busy, **(clear or {}), self._cancel: gr.Button(interactive=True), self._status: ""}
        idle = {button: gr.Button(interactive=True) for button in self._buttons}
        idle[self._cancel] = gr.Button(interactive=False)
        try:
            with _folder(self._folder) as folder:
                for progress, ahead, new in self._followed(request, begin, Path(folder)):
                    status = status_html(progress, ahead, language)
                    yield {self._status: status, **(show(progress.made) if new else {})}
                seconds = round(sum(progress.seconds.values()))
                yield {**idle, self._status: html.escape(words("done", language, seconds))}
        except (Interrupted, CancelledError):
            yield {**idle, self._status: html.escape(words("cancelled", language))}
        except Exception as error:
            yield {**idle, self._status: _alert(error_words(error, language, _report))}

    def _followed(
        self, request: gr.Request, begin: Callable[[], tuple[Callable, int]], folder: Path
    ) -> Iterator[tuple[Watched, int, bool]]:
        """Yield a job's progress, the jobs before it, and whether there is a new file; raise its error."""
        task, videos = begin()
        job: Job = self.jobs.enter(_page_of(request), partial(task, folder), videos)
        shown = 0
        for ahead in self.jobs.follow(job):
            made = len(job.progress.made)
            yield job.progress, ahead, made > shown
            shown = made
        job.future.result()
        yield job.progress, 0, len(job.progress.made) > shown

    # What programs call.

    def _connect_api(self) -> None:
        seed = gr.Number(None, precision=0, minimum=0, label="seed", visible=False)
        refine = gr.Checkbox(False, label="refine", visible=False)
        text = gr.Textbox("", label="text", visible=False)
        video = gr.Video(visible=False, label="video")
        gr.Button(visible=False).click(
            self._on_api, [self._picture, seed, refine, text], video,
            api_name="make", concurrency_limit=None,
            api_description="Make a video of a picture; with refine, a larger, sharper one.",
        )  # fmt: skip

    def _on_api(
        self, request: gr.Request, picture: str | None, seed: Any, refine: bool, text: str
    ) -> Iterator[str]:
        def task(folder: Path, progress: Watched) -> None:
            seeds = work.seeds_from(seed, 1)
            work.try_seeds(self._models, _needed(picture, "picture"), seeds, {}, folder, progress)
            if refine:
                work.refine(self._models, progress.made[0], {"text": text or ""}, folder, progress)

        try:
            with _folder(self._folder) as folder:
                *_, (progress, _, _) = self._followed(request, lambda: (task, 1), Path(folder))
                yield progress.made[-1]
        except (Exception, CancelledError) as error:
            raise gr.Error(error_words(error, _language(request), _report), print_exception=False) from None


def _picture(label: Any, elem_id: str) -> Any:
    """Return a place for a picture. Its file goes to the engine as it was sent, to be judged there."""
    picture = gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], elem_id=elem_id
    )
    picture.preprocess = lambda payload: payload and payload.path
    return picture


def _player(label: Any, elem_id: str) -> Any:
    """Return a place where a video plays over and over."""
    return gr.Video(label=label, interactive=False, autoplay=True, loop=True, elem_id=elem_id)


def _folder(parent: Path) -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(dir=parent)
    except OSError as error:
        raise OutputError(f"the server cannot write files: {error.strerror}") from error


def _needed(path: str | None, what: str) -> str:
    if not path:
        raise InvalidInputError(f"need_{what}")
    return path


def _page_of(request: gr.Request) -> str:
    return str(request.session_hash)


def _language(request: gr.Request) -> int:
    return language_of(request.headers.get("accept-language"))


def _report(error: BaseException) -> None:
    logger.error("a job failed", exc_info=error)


def _alert(text: str) -> str:
    return f'<div role="alert">{html.escape(text)}</div>'


def status_html(progress: Watched, ahead: int, language: int) -> str:
    """Return a bar with the phase, the step and the time that is left, and the live picture."""
    if progress.now == "waiting":
        return f"<progress></progress><div>{html.escape(words('ahead', language, ahead))}</div>"
    parts = [words(progress.now, language)]
    if progress.videos > 1:
        parts.insert(0, words("of_videos", language, progress.video + 1, progress.videos))
    bar = "<progress></progress>"
    if progress.now == "denoising":
        parts.append(words("step", language, progress.step, progress.total))
        done = (progress.video + progress.step / max(progress.total, 1)) / progress.videos
        bar = f'<progress value="{done:.3f}" max="1"></progress>'
        if (left := progress.seconds_left) is not None:
            key, value = ("minutes_left", left / 60) if left >= 120 else ("left", left)
            parts.append(words(key, language, round(value)))
    picture = f'<img src="{progress.picture}" alt="">' if progress.picture else ""
    return f"{bar}<div>{html.escape(', '.join(parts))}</div>{picture}"


def record_html(path: str) -> str:
    """Return a table of how a video was made, from its file.

    Raises:
        InvalidInputError: if the file does not say so.
    """
    entries = from_metadata(read_metadata(path))
    if not entries:
        raise InvalidInputError("no_record")
    first = entries.pop(FIRST_STAGE, None)
    tables = [entries, *([first] if isinstance(first, dict) else [])]
    return "".join(f'<table class="record">{_rows(each)}</table>' for each in tables)


def _rows(entries: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"<td>{html.escape(text[:500])}</td>"

    return "".join(f"<tr>{cell(name)}{cell(value)}</tr>" for name, value in sorted(entries.items()))
