"""Measure ``enhance`` on a video: seconds, peak memory, seams, colour drift, against length, size and tiles.

python scripts/measure_enhancement.py VIDEO --model DIR [--lengths 16 32 64] [--scales 1 2] [--tiles 0 128]

It prints a Markdown table, and with ``--picture PATH`` draws a frame before and after, side by side.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from modelscope_i2v import VideoToVideo
from modelscope_i2v.engine.memory.tiles import TileLimit
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


def costs(stage: VideoToVideo, frames: np.ndarray, tile: int, repeats: int = 3) -> str:
    """Processor seconds of tiles beside whole frames, and of a file as it comes beside a call, in turn."""
    video = Video(frames, 25.0)
    size = [4 * (side // 2) for side in frames.shape[2:0:-1]]
    settings = {"seed": 1, "resolution": size, "scene_cuts": False}

    def enhanced(folder: str) -> None:
        write_video(frames, f"{folder}/in.mp4", 25)
        stage.enhance(f"{folder}/in.mp4", f"{folder}/out.mp4", colour="model", **settings)

    with tempfile.TemporaryDirectory() as folder:
        runs = (
            lambda: stage(video, **settings),
            lambda: stage(video, tile_size=tile, **settings),
            lambda: stage(video, **settings).save(f"{folder}/whole.mp4"),
            lambda: enhanced(folder),
        )
        rounds = [[processor_seconds(run) for run in runs] for _ in range(repeats + 1)][1:]  # one to warm up
    whole, tiled, saved, streamed = (sorted(values)[repeats // 2] for values in zip(*rounds))
    config, scale = stage.settings.unet, stage.settings.autoencoder.downscale
    (rows, columns), (over_rows, over_columns) = TileLimit(tile).layout(tile, config, scale)
    height, width = config.padded_size(-(-size[1] // scale), -(-size[0] // scale))
    tiles = len(window_starts(height, rows, over_rows)) * len(window_starts(width, columns, over_columns))
    counted = tiles * min(rows, height) * min(columns, width) / (height * width)
    return (
        f"tiles of {tile} pixels: {tiled / whole:.2f} times whole frames, {counted:.2f} times the positions\n"
        f"a file as it comes: {streamed / saved:.2f} times the same in memory, then written"
    )


def processor_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


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
    if max(arguments.tiles):
        print(costs(stage, video[: arguments.lengths[0]], max(arguments.tiles)))
    if arguments.picture:
        picture(stage, video[: arguments.lengths[0]], arguments.picture)


if __name__ == "__main__":
    main()
