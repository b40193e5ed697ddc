"""What a batch is made of: items read from files, folders and lists, each with its keywords checked."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Iterable, Iterator, Mapping
from urllib.parse import urlsplit

from ..errors import InvalidInputError, OutputError, describe
from ..media.sources import IMAGE_ENDINGS, VIDEO_ENDINGS, input_errors, open_source, source_name, url_scheme
from ..settings.keywords import REFINE_PREFIX, check_keywords, keywords_of, split_keywords
from ..settings.rules import boolean, did_you_mean, optional, text, unique_keys
from ..settings.stages import IMAGE_TO_VIDEO, VIDEO_TO_VIDEO

LIST_ENDING = ".jsonl"
#: Keys of an item in a list, beside keywords.
_OWN_KEYS = ("image", "video", "output", "refine")
#: Keywords that only code can give, and what the whole batch decides.
_NOT_IN_LISTS = ("callback", "generator", "progress")
#: What some codec needs another ending for than ``.mp4``.
_ENDINGS = {"prores": ".mov"}


@dataclass(frozen=True)
class Item:
    """One video to make.

    Attributes:
        source: a path or a URL of an image or a video.
        output: the video's path in the batch's folder, with ``/`` between its parts.
        first: stage one's keywords, checked; None for a video, which stage one does not see.
        second: stage two's; None for an image that is not refined.
        place: where the item stands, for messages.
    """

    source: str
    output: str
    first: Mapping[str, Any] | None
    second: Mapping[str, Any] | None
    place: str

    @property
    def is_video(self) -> bool:
        return self.first is None

    @property
    def stages(self) -> list[str]:
        """The stages that it goes through."""
        needed = ((IMAGE_TO_VIDEO, self.first), (VIDEO_TO_VIDEO, self.second))
        return [stage for stage, keywords in needed if keywords is not None]

    def key(self, models: Mapping[str, Any]) -> str:
        """Return what tells whether a video is this item's: a hash of the input, the keywords and the models.

        A file counts by its content, a URL by its text.

        Raises:
            MissingFileError, InvalidInputError: if the input cannot be read.
        """
        kind = "video" if self.is_video else "image"
        content = self.source if url_scheme(self.source) else file_sha256(self.source, kind)
        used = {stage: models[stage] for stage in self.stages}
        parts = [content, self.first, self.second, used]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_sha256(path: str | os.PathLike, kind: str = "file") -> str:
    """Return the SHA-256 of a file that is called ``kind`` in messages, as hexadecimal digits."""
    digest = hashlib.sha256()
    with input_errors(kind, path), open_source(path, kind, 0) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@dataclass
class _Entry:
    """An item as it was given, with the keywords of its own."""

    source: str
    is_video: bool
    name: str
    place: str
    keywords: dict[str, Any]
    refine: bool | None = None
    output: str | None = None


def read_items(
    inputs: Iterable[str], folder: str, keywords: Mapping[str, Any] | None = None, refine: bool = False
) -> list[Item]:
    """Return the items of a batch.

    Args:
        inputs: paths and URLs of images and videos; folders, with whatever images and videos are below; and
            lists, files that end in ``.jsonl``, with a JSON object in each line: ``image`` or ``video``, a
            path from the list's folder or a URL; ``output``, a path in ``folder``; ``refine``; keywords.
        folder: where the videos go.
        keywords: those of all items that have none of their own, as of a call of both stages.
        refine: whether stage two follows on stage one.

    Raises:
        InvalidInputError, MissingFileError: for an input or a keyword that cannot be used, nothing to do, a
            keyword that no item uses, and two items with one output.
        OutputError: for an output that is not in the folder.
    """
    entries = [entry for each in inputs for entry in _entries(each, folder)]
    if not entries:
        raise InvalidInputError("there is no input")
    defaults = dict(keywords or {})
    only_videos = all(entry.is_video for entry in entries)
    used: set[str] = set()
    items = [_item(entry, defaults, refine, only_videos, used) for entry in entries]
    if unused := [name for name in defaults if name not in used]:
        raise InvalidInputError(
            f"no item takes {', '.join(unused)}: images that are not refined take stage one's keywords, "
            "videos stage two's"
        )
    _check_outputs(items)
    return items


def _entries(given: str, folder: str) -> Iterator[_Entry]:
    """Yield what one of the inputs holds."""
    if url_scheme(given):
        name = PurePosixPath(urlsplit(given).path).name or "video"
        yield _Entry(given, _is_video(name), name, source_name(given), {})
        return
    path = Path(given).expanduser()
    if path.is_dir():
        yield from _entries_of_folder(path, folder)
    elif path.suffix.lower() == LIST_ENDING:
        yield from _entries_of_list(path)
    else:
        yield _Entry(str(path.absolute()), _is_video(path.name), path.name, source_name(given), {})


def _is_video(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in VIDEO_ENDINGS


def _entries_of_folder(path: Path, folder: str) -> Iterator[_Entry]:
    """Yield images and videos of a folder and those in it, in order, without the batch's own."""
    own = os.path.realpath(folder)
    if own == os.path.realpath(path):
        raise InvalidInputError(f"the folder '{path}' is input and output: give another for the videos")
    empty = True
    for found, folders, names in os.walk(path.absolute()):
        folders[:] = sorted(
            each for each in folders
            if not each.startswith(".") and os.path.realpath(os.path.join(found, each)) != own
        )  # fmt: skip
        for name in sorted(names):
            if name.startswith(".") or Path(name).suffix.lower() not in IMAGE_ENDINGS | VIDEO_ENDINGS:
                continue
            empty = False
            file = Path(found, name)
            inside = file.relative_to(path.absolute()).as_posix()
            yield _Entry(str(file), _is_video(name), inside, source_name(path / inside), {})
    if empty:
        raise InvalidInputError(f"the folder '{path}' holds no image and no video")


def _entries_of_list(path: Path) -> Iterator[_Entry]:
    """Yield the items of a list."""
    with input_errors("list", path):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    if not any(line.strip() for line in lines):
        raise InvalidInputError(f"the list '{path}' is empty")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}: line {number}"
            try:
                yield _entry_of_line(json.loads(line, object_pairs_hook=unique_keys), path, place)
            except (InvalidInputError, OutputError):
                raise
            except (ValueError, RecursionError) as error:
                raise InvalidInputError(f"{place}: is no JSON object: {error}") from error


def _entry_of_line(values: Any, path: Path, place: str) -> _Entry:
    if not isinstance(values, dict) or ("image" in values) == ("video" in values):
        raise InvalidInputError(f"{place}: an object with image or video is needed, got {describe(values)}")
    kind = "image" if "image" in values else "video"
    name = text(non_empty=True)
    checks = {kind: name, "output": optional(name), "refine": optional(boolean())}
    source, output, refine = (
        rule.check(f"{place}: {key}", values.get(key), InvalidInputError) for key, rule in checks.items()
    )
    known = _keys_of_lists()
    if unknown := [name for name in values if name not in known]:
        raise InvalidInputError(
            f"{place}: an item has no {describe(unknown[0])}{did_you_mean(unknown[0], known)}"
        )
    if url_scheme(source):
        stem = PurePosixPath(urlsplit(source).path).name
    else:
        source = os.path.join(path.absolute().parent, os.path.expanduser(source))
        stem = Path(source).name
    if output is not None and (os.path.isabs(output) or ".." in PurePosixPath(output).parts):
        raise OutputError(f"{place}: output: got {describe(output)}, allowed is a path in the batch's folder")
    own = {key: value for key, value in values.items() if key not in _OWN_KEYS}
    return _Entry(source, kind == "video", stem or "video", place, own, refine, output)


def _keys_of_lists() -> set[str]:
    """Return what an item of a list may have."""
    first, second = keywords_of(IMAGE_TO_VIDEO), keywords_of(VIDEO_TO_VIDEO)
    keywords = {*first, *second, *(REFINE_PREFIX + name for name in second)}
    without = {prefix + name for name in _NOT_IN_LISTS for prefix in ("", REFINE_PREFIX)}
    return keywords.difference(without).union(_OWN_KEYS)


def _item(
    entry: _Entry, defaults: Mapping[str, Any], refine: bool, only_videos: bool, used: set[str]
) -> Item:
    """Return an entry's item; the names of the defaults that it takes go into ``used``."""
    refined = refine if entry.refine is None else entry.refine
    first: dict[str, Any] | None = None
    second: dict[str, Any] | None
    try:
        if entry.is_video:
            taken = _names_of_video(defaults, only_videos)
            own = {**{name: name for name in entry.keywords}, **_names_of_video(entry.keywords, True)}
            keywords = {taken[name]: defaults[name] for name in taken}
            keywords.update({own[name]: entry.keywords[name] for name in own})
            second = check_keywords(VIDEO_TO_VIDEO, keywords)
        else:
            known = keywords_of(IMAGE_TO_VIDEO)
            taken = {name: name for name in defaults if refined or name in known}
            first, second = _of_image({**{name: defaults[name] for name in taken}, **entry.keywords}, refined)
    except InvalidInputError as error:
        raise InvalidInputError(f"{entry.place}: {error}") from error
    used.update(taken)
    return Item(entry.source, _output(entry, second), first, second, entry.place)


def _names_of_video(keywords: Mapping[str, Any], alone: bool) -> dict[str, str]:
    """Return stage two's names for those of a call's keywords that a video takes, ``refine_`` ones last.

    What each stage has for itself is stage two's without ``refine_`` only where it is ``alone``.
    """
    first, second = keywords_of(IMAGE_TO_VIDEO), keywords_of(VIDEO_TO_VIDEO)
    names = {}
    for name in sorted(keywords, key=lambda name: name.startswith(REFINE_PREFIX)):
        plain = name.removeprefix(REFINE_PREFIX)
        is_firsts = name in first and not first[name].both
        if plain in second and (alone or not is_firsts):
            names[name] = plain
    return names


def _of_image(keywords: dict[str, Any], refined: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return an image's keywords by stage, checked."""
    if not refined:
        known = keywords_of(IMAGE_TO_VIDEO)
        if others := [name for name in keywords if name not in known]:
            raise InvalidInputError(f"without refine there is no stage two for {', '.join(others)}")
        return check_keywords(IMAGE_TO_VIDEO, keywords), None
    if "reuse_interval" in keywords:  # for both, unless stage two has its own
        keywords = {"refine_reuse_interval": keywords["reuse_interval"], **keywords}
    return split_keywords(keywords)


def _output(entry: _Entry, second: Mapping[str, Any] | None) -> str:
    """Return where an item's video goes: by its input's name, unless it says otherwise."""
    if entry.output is not None:
        return PurePosixPath(entry.output).as_posix()
    ending = _ENDINGS.get((second or {}).get("codec", ""), ".mp4")
    return PurePosixPath(entry.name).with_suffix(ending).as_posix()


def _check_outputs(items: Iterable[Item]) -> None:
    """Refuse two items with one output.

    Raises:
        InvalidInputError: naming both.
    """
    by_output: dict[str, Item] = {}
    for item in items:
        other = by_output.setdefault(os.path.normcase(item.output), item)
        if other is item:
            continue
        if other.source == item.source and (other.first, other.second) == (item.first, item.second):
            raise InvalidInputError(f"{item.place} is given twice; the other is {other.place}")
        raise InvalidInputError(
            f"{other.place} and {item.place} have one output, {item.output!r}: give one of them another in a "
            "list, by its key output"
        )
