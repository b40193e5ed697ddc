"""Measure ``enhance`` on a video: seconds, peak memory, seams, colour drift, against length, size and tiles.

python scripts/measure_enhancement.py VIDEO --model DIR [--lengths 16 32 64] [--scales 1 2] [--tiles 0 128]

It prints a Markdown table, and with ``--picture PATH`` draws a frame before and after, side by side.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from modelscope_i2v import VideoToVideo
from modelscope_i2v.media.video import Video, read_video, write_video
from modelscope_i2v.metrics import seam_score
from modelscope_i2v.samplers.windows import window_starts

HEADER = (
    "| frames | size | tiles | seconds a frame | peak MiB | seam of windows | of tiles | colour drift |\n"
    "|---|---|---|---|---|---|---|---|"
)


def peak_mebibytes() -> float:
    """The most that this process has held since ``forget_peak``; Linux only."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def borders(length: int, size: int, overlap: int) -> list[int]:
    """Where a second window or tile begins to count, in the middle of what two share."""
    return [start + overlap // 2 for start in window_starts(length, size, overlap)[1:]]


def row(stage: VideoToVideo, frames: np.ndarray, scale: float, tile: int | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, output = str(Path(folder, "in.mp4")), str(Path(folder, "out.mp4"))
        write_video(frames, source, 25)
        forget_peak()
        start = time.perf_counter()
        done = stage.enhance(source, output, scale=scale, seed=1, tile_size=tile, scene_cuts=False)
        seconds, peak = time.perf_counter() - start, peak_mebibytes()
        made, given = read_video(output).frames, read_video(source).frames
    window, overlap = done.record["chunk_size"], done.record["overlap_size"]
    windows = borders(len(made), window, overlap)
    columns = borders(made.shape[2], tile, tile // 4) if tile and made.shape[2] > tile else []
    drift = np.abs(made.mean((1, 2)) - given.mean((1, 2))).mean()
    cells = [
        str(len(made)),
        "{}x{}".format(*done.size),
        str(tile or "-"),
        f"{seconds / len(made):.2f}",
        f"{peak:.0f}",
        f"{seam_score(made, windows, 0):.2f}" if windows else "-",
        f"{seam_score(made, columns, 2):.2f}" if columns else "-",
        f"{drift:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def picture(stage: VideoToVideo, frames: np.ndarray, path: str) -> None:
    """Draw the middle frame, enlarged bicubically and by stage two."""
    made = stage(Video(frames, 25.0), scale=2, seed=1, colour="source").frames
    middle = len(frames) // 2
    after = Image.fromarray(made[middle])
    before = Image.fromarray(frames[middle]).resize(after.size, Image.Resampling.BICUBIC)
    both = Image.new("RGB", (2 * after.width + 8, after.height), "white")
    both.paste(before, (0, 0))
    both.paste(after, (after.width + 8, 0))
    both.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--model", required=True, help="stage two's folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--scales", type=float, nargs="+", default=[2])
    parser.add_argument("--tiles", type=int, nargs="+", default=[0], help="sides in pixels, 0 for none")
    parser.add_argument("--picture", help="where to draw a frame before and after")
    arguments = parser.parse_args()
    stage = VideoToVideo.load(arguments.model)
    video = read_video(arguments.video, max(arguments.lengths)).frames
    print(HEADER)
    for length in arguments.lengths:
        for scale in arguments.scales:
            for tile in arguments.tiles:
                print(row(stage, video[:length], scale, tile or None), flush=True)
    if arguments.picture:
        picture(stage, video[: arguments.lengths[0]], arguments.picture)


if __name__ == "__main__":
    main()
