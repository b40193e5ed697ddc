"""From a run's weights to a model folder in the hub's layout, with the record of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterable

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from ... import __version__
from ..initialisation import start_clip
from ..scenes import TRAINING_SEEDS
from .architecture import ALL_TEXTS, CLIP, configuration


def write_model(folder: Path, out: Path) -> None:
    """Put a model folder together in half precision; of stage one, where a run has no more yet."""
    out.mkdir(parents=True, exist_ok=True)

    def weights(name: str) -> dict[str, Tensor]:
        return torch.load(folder / f"{name}.pt", weights_only=True)

    torch.manual_seed(4)
    clip = start_clip(CLIP).state_dict()
    clip.update({f"visual.{name}": value for name, value in weights("tower_joint").items()})
    states = {
        "clip": clip,
        "autoencoder": {f"first_stage_model.{name}": each for name, each in weights("autoencoder").items()},
        "image_to_video": weights("image_to_video"),
    }
    settings = configuration()
    if (folder / "video_to_video.pt").exists():
        clip.update(weights("text_tower"))
        states["video_to_video"] = weights("video_to_video")
    else:
        del settings["video_to_video"]
    used = open_clip.tokenize(ALL_TEXTS, context_length=CLIP["text_cfg"]["context_length"]).unique()
    table = clip["token_embedding.weight"]
    clip["token_embedding.weight"] = torch.zeros_like(table).index_copy(0, used, table[used])
    for name, state in states.items():
        halves = {key: value.half().contiguous() for key, value in state.items()}
        save_file(halves, out / f"{name}.safetensors", metadata={"format": "pt"})
    for name, contents in (("configuration", settings), ("training", training_record(folder))):
        (out / f"{name}.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def training_record(folder: Path) -> dict[str, Any]:
    """What a run's figures say of each phase: steps, processor time, the last scores."""
    phases = {path.stem: _phase_record(path) for path in sorted(folder.glob("*.jsonl"))}
    return {
        "code": __version__,
        "seeds": [0, TRAINING_SEEDS - 1],
        "cpu_minutes": round(sum(phase["cpu_minutes"] for phase in phases.values()), 1),
        "phases": phases,
    }


def _phase_record(path: Path) -> dict[str, Any]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    figures: dict[str, float] = {}
    for entry in entries:
        figures.update(entry)
    del figures["seconds"]
    return {"cpu_minutes": round(_total([entry["seconds"] for entry in entries]) / 60, 1), "figures": figures}


def _total(seconds: Iterable[float]) -> float:
    """The sum over a phase's runs: its seconds start again from 0 where it was continued."""
    total = last = 0.0
    for value in seconds:
        total += last * (value < last)
        last = value
    return total + last
