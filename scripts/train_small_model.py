"""Train the small model that ships with the package, from scenes that the project draws itself.

    python scripts/train_small_model.py --run RUN                 all phases, in order
    python scripts/train_small_model.py --run RUN --phase tower   one of them

A phase that was interrupted continues from its checkpoint in the run's folder; ``RUN/PHASE.jsonl`` has its
figures. ``write`` puts a model folder together from what is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import torch

from modelscope_i2v.training.loop import Schedule, Training, train
from modelscope_i2v.training.small_model import PHASES
from modelscope_i2v.training.small_model.folder import write_model

logger = logging.getLogger("train_small_model")


def run_phase(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Train one phase to its end, with a checkpoint every minute and a line of figures every 20 steps."""
    phase = PHASES[name](folder)
    steps = arguments.steps or phase.steps
    training = Training(
        phase.network,
        Schedule(steps, arguments.rate or phase.rate),
        seed=arguments.seed,
        rate_factors=phase.rate_factors,
        average_decay=phase.average_decay,
    )
    checkpoint = folder / f"{name}.checkpoint"
    if checkpoint.exists():
        training.load(checkpoint)
        logger.info("%s continues at step %d", name, training.step)
    saved, begun = time.monotonic(), time.process_time()
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as log:
        mean = 0.0
        for state in train(training, phase.loss):
            mean += (state.loss - mean) / min(state.step, 20)
            if state.step % 20 and state.step < steps:
                continue
            late = time.monotonic() - saved > 60 or state.step == steps
            figures = {"step": state.step, "loss": mean, "rate": state.rate, **state.figures}
            figures["seconds"] = time.process_time() - begun
            if late:
                training.save(checkpoint)
                phase.save(training.average)
                figures.update(phase.evaluate(training.average))
                saved = time.monotonic()
            log.write(json.dumps(figures) + "\n")
            log.flush()
            if late:
                logger.info("%s: %s", name, {key: round(value, 4) for key, value in figures.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and figures")
    parser.add_argument("--phase", choices=[*PHASES, "write"], help="one phase; all by default")
    parser.add_argument("--out", type=Path, help="where to write the model folder; RUN/model by default")
    parser.add_argument("--steps", type=int, help="instead of the phase's own")
    parser.add_argument("--rate", type=float, help="learning rate instead of the phase's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.run.mkdir(parents=True, exist_ok=True)
    for name in PHASES if arguments.phase is None else {arguments.phase} & PHASES.keys():
        run_phase(name, arguments.run, arguments)
    if arguments.phase in (None, "write"):
        write_model(arguments.run, arguments.out or arguments.run / "model")


if __name__ == "__main__":
    main()
