"""Training runs: memory, resuming to the bit, results that load, and the doors to it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from live_memory import LiveMemory, TrainedFlashAttention
from modelscope.pipelines import pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_networks import TINY, built
from training_data import draw_folder, with_smaller_unet

from modelscope_i2v import cli
from modelscope_i2v.errors import (
    CheckpointError,
    ConfigurationError,
    InvalidInputError,
    MissingPackageError,
    OutputError,
)
from modelscope_i2v.models.config import UNetConfig
from modelscope_i2v.models.unet import UNet
from modelscope_i2v.settings.training import TrainingSettings
from modelscope_i2v.training.fine_tuning import FineTuning, training_dtype
from modelscope_i2v.training.lora import add_lora
from modelscope_i2v.training.memory import add_checkpointing, estimate_training_memory

CPU = torch.device("cpu")
STAGES = ("image-to-video", "video-to-video")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Latents and embeddings, for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def models(small_model, tmp_path_factory):
    """Model folders by stage."""
    root = tmp_path_factory.mktemp("models")
    return {stage: with_smaller_unet(folder, root / stage) for stage, folder in zip(STAGES, small_model)}


@pytest.fixture
def begin(models, data, cache, tmp_path):
    """Begin a run of a stage in a folder of its own."""

    def begin(name="run", resume=False, **settings):
        settings = {"steps": 4, "lora": 2, "learning_rate": 1e-3, "warmup": 2, "save_every": 2, **settings}
        stage = settings.setdefault("stage", STAGES[0])
        settings.setdefault("size", (64, 32 if stage == STAGES[0] else 48))
        checked, folder = TrainingSettings(**settings), tmp_path / name
        return FineTuning(models[stage], data, folder, checked, resume=resume, cache=cache)

    return begin


def weights_of(run):
    return {name: value for name, value in run.result.state_dict().items()}


# Checkpointing and memory


def test_checkpointing_gives_the_same_gradients():
    unets = [built(UNetConfig(**TINY)).requires_grad_() for _ in range(2)]
    add_checkpointing(unets[1])
    x, t, y = torch.ones(1, 4, 2, 8, 8), torch.tensor([5]), torch.ones(1, 1, 24)
    for unet in unets:
        unet(x, t, y).square().mean().backward()
    for name, parameter in unets[0].named_parameters():
        other = unets[1].get_parameter(name).grad
        assert other is not None and torch.allclose(parameter.grad, other, atol=1e-6), name


@pytest.mark.slow
def test_the_estimate_is_what_a_step_holds_of_the_published_network():
    settings, latent = TrainingSettings(lora=16), (32, 32, 56)
    with torch.device("meta"):
        unet = UNet(UNetConfig(), TrainedFlashAttention.apply).to(torch.bfloat16).requires_grad_(False)
    add_lora(unet, settings.lora)
    unet.to("meta")
    add_checkpointing(unet)
    x, t, y = (torch.empty(shape, device="meta") for shape in ((1, 4, *latent), (1,), (1, 1, 1024)))
    with LiveMemory(unet) as memory:
        unet(x, t, y).float().square().mean().backward()
    estimate = estimate_training_memory(unet, settings, latent, torch.bfloat16)
    assert estimate.step == pytest.approx(memory.peak, rel=0.1)
    assert estimate.total < 8 * 2**30  # a third of a 24 GB card


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("stage, full", [(STAGES[0], False), (STAGES[1], True)], ids=["lora", "full"])
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(begin, stage, full):
    options = {"stage": stage, "full": full, "accumulate": 2, "steps": 3, "save_every": 1}
    whole = begin("whole", **options)
    before = {name: value.clone() for name, value in weights_of(whole).items()}
    whole.train()

    first = begin("resumed", **options)
    for state in first.states():
        if state.step == 2:
            first.checkpoints.save(first.training)
            break
    second = begin("resumed", resume=True, **options)
    assert second.training.step == 2
    second.train()
    assert weights_of(second).keys() == weights_of(whole).keys()
    for name, value in weights_of(second).items():
        assert torch.equal(value, weights_of(whole)[name]), name
    changed = [name for name, value in weights_of(whole).items() if not torch.equal(value, before[name])]
    assert changed and (full or all("lora_" in name for name in changed))


def test_a_run_can_only_be_resumed_with_its_settings(begin):
    begin().train()
    with pytest.raises(InvalidInputError, match="holds a run already: resume it"):
        begin()
    with pytest.raises(InvalidInputError, match=r"learning_rate was 0\.001 and is 0\.5"):
        begin(resume=True, learning_rate=0.5)
    assert begin(resume=True, save_every=1, keep=1).training.step == 4


def test_the_last_checkpoints_are_kept(begin):
    run = begin(steps=5, save_every=1, keep=2)
    run.train()
    assert [path.stem for path in run.checkpoints.paths()] == ["step-00000004", "step-00000005"]


KILLED = """
import os, signal, sys, torch
from modelscope_i2v.settings.training import TrainingSettings
from modelscope_i2v.training.fine_tuning import FineTuning
model, data, folder, cache = sys.argv[1:]
settings = TrainingSettings(
    steps=4, lora=2, learning_rate=1e-3, warmup=2, save_every=2, size=(64, 32)
)
run, save = FineTuning(model, data, folder, settings, cache=cache), torch.save
def half(state, path):
    save(state, path)
    if state["step"] == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
run.train()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_while_saving_the_last_checkpoint_is_whole(begin, models, data, cache, tmp_path):
    folders = [str(each) for each in (models[STAGES[0]], data, tmp_path / "killed", cache)]
    done = subprocess.run([sys.executable, "-c", KILLED, *folders], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "killed" / "checkpoints").glob("*.part"))) == 1
    run, whole = begin("killed", resume=True), begin("whole")
    assert run.training.step == 2 and not list(run.checkpoints.folder.glob("*.part"))
    run.train(), whole.train()
    assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(run).items())


def test_what_would_fail_after_encoding_fails_before_it(models, data, tmp_path, monkeypatch):
    def begin(folder, **settings):
        FineTuning(models[STAGES[0]], data, folder, TrainingSettings(**settings), cache=tmp_path / "cache")

    with pytest.raises(OutputError, match="cannot write"):
        begin(data / "0.mp4")
    for package, settings in (("bitsandbytes", {"optimizer": "adamw8bit"}), ("peft", {})):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingPackageError, match=package):
            begin(tmp_path / "run", **settings)
    assert not (tmp_path / "cache").exists()


def test_an_adapter_says_where_it_comes_from(begin):
    output = begin().train()
    with safe_open(output / "adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["stage"] == "image-to-video" and metadata["steps"] == "4" and metadata["rank"] == "2"
    assert json.loads(metadata["training"])["learning_rate"] == 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_full_training_writes_a_model_that_pipelines_load(begin, stage, data):
    run = begin(stage=stage, full=True, steps=2, ema_decay=0)
    output = str(run.train())
    pipe = pipeline(stage, model=output, device="cpu", steps=1, resolution=(32, 32), max_frames=2)
    trained = run.stage.unet.state_dict()
    for name, value in pipe.model.generator.state_dict().items():
        assert torch.allclose(value, trained[name].half().float()), name
    source = str(data / "3.png") if stage == STAGES[0] else {"video_path": str(data / "0.mp4")}
    assert len(pipe(source)["output_video"]) > 100


def test_validation_videos_have_fixed_seeds(begin):
    run = begin(steps=2, validate_every=2, rate_schedule="constant")
    [before] = run.validate()
    again = run.validate()[0].read_bytes()
    before = before.read_bytes()
    run.train()
    after = run.folder / "validation" / "step-00000002" / "0.mp4"
    assert before == again != after.read_bytes()


@pytest.mark.slow
def test_the_loss_of_a_clip_goes_down(begin):
    run = begin(full=True, steps=12, learning_rate=3e-3, batch_size=2, ema_decay=0, drop_condition=0)
    before = run.evaluate()
    assert run.evaluate() == before
    list(run.states())
    assert run.evaluate()["loss"] < 0.9 * before["loss"]


def test_epochs_are_as_many_steps_as_the_clips_take(begin):
    assert begin(epochs=3, batch_size=2, accumulate=2).settings.steps == 3  # 3 x 4 clips / 4


def test_stage_two_warns_where_captions_are_missing(models, data, tmp_path, caplog):
    rows = [{"video": str(data / "0.mp4")}, {"video": str(data / "1.mp4"), "text": "a cat"}]
    settings = TrainingSettings(stage=STAGES[1], lora=1, size=(32, 32), frames=2, clips=1)
    FineTuning(models[STAGES[1]], rows, tmp_path / "run", settings)
    assert "1 of 2 clips have no caption" in caplog.text


def test_precision_is_the_devices():
    assert training_dtype("auto", CPU) == torch.float32
    assert training_dtype("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_training_in_bfloat16_keeps_trained_weights_in_float32(begin, full):
    run = begin(precision="bf16", full=full, steps=2)
    states = list(run.states())
    assert all(math.isfinite(state.loss) for state in states)
    types = {(value.requires_grad, value.dtype) for value in run.stage.unet.parameters()}
    assert types == {(True, torch.float32)} | (set() if full else {(False, torch.bfloat16)})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 0}, "steps: got 0, allowed is a whole number from 1"),
        ({"stage": "third"}, "stage: got 'third', allowed is one of image-to-video, video-to-video"),
        ({"learning_rat": 1}, "no setting 'learning_rat'; did you mean 'learning_rate'"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        TrainingSettings.of(settings)


def test_tensorboard_gets_scalars_where_it_is_installed(begin):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = begin()
    losses = [state.loss for state in run.states()]
    found = events.EventAccumulator(str(run.folder / "logs")).Reload()
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(losses)


# The doors


def test_the_command_trains_and_its_adapter_is_used(models, data, cache, tmp_path, capsys):
    arguments = ["train", str(data), "-o", str(tmp_path / "out"), "--model", str(models[STAGES[0]])]
    arguments += ["--size", "64x32", "--steps", "2"]
    arguments += ["--lora", "2", "--learning-rate", "0.01", "--cache", str(cache), "--device", "cpu"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "3 clips and 1 images, on cpu" in shown and "weights to train in fp32: it takes about" in shown
    assert shown.endswith("output: an adapter after 2 steps\n")
    assert load_file(tmp_path / "out" / "output" / "adapter.safetensors")
    assert cli.main(arguments) == 2
    assert "resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert cli.main([*arguments, "--full"]) == 2


@pytest.mark.slow
def test_several_processes_train_one_adapter(models, data, tmp_path):
    """With half of the clips each, and with the mean of their gradients."""
    arguments = [str(data), "-o", str(tmp_path / "out"), "--model", str(models[STAGES[0]]), "--size", "64x32"]
    arguments += ["--steps", "2", "--accumulate", "2", "--lora", "2", "--save-every", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "modelscope_i2v", "train", *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 clips and 1 images") == 1
    assert load_file(tmp_path / "out" / "output" / "adapter.safetensors")
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == 2


def test_the_command_names_faults(data, tmp_path, capsys):
    assert cli.main(["train", str(data), "-o", str(tmp_path / "out"), "--steps", "0"]) == 2
    assert "steps: got 0" in capsys.readouterr().err
    assert cli.main(["train", str(data), "-o", str(tmp_path / "out"), "--model", "nowhere"]) == 2
    assert "there is no folder 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_modelscopes_trainers_train_and_evaluate(models, data, tmp_path, stage):
    from modelscope.trainers import build_trainer

    def modify(cfg):
        cfg.train.optimizer.lr = 2e-3
        cfg.train.dataloader.batch_size_per_gpu = 2
        cfg.train.max_epochs = 2
        return cfg

    rows = [{"video": str(data / f"{number}.mp4"), "text": "a cat"} for number in range(3)]
    arguments = {
        "model": str(models[stage]), "train_dataset": rows, "eval_dataset": rows[:1],
        "work_dir": str(tmp_path), "cfg_modify_fn": modify, "lora_rank": 2, "size": (32, 32), "frames": 2,
        "clips": 1, "device": "cpu",
    }  # fmt: skip
    trainer = build_trainer(f"{stage}-trainer", default_args=arguments)
    settings = trainer.settings
    assert (settings.stage, settings.lora, settings.learning_rate) == (stage, 2, 2e-3)
    trainer.train()
    assert trainer.run.training.step == 3  # 2 x 3 clips / 2
    options = {"model": str(models[stage]), "device": "cpu", "steps": 1, "resolution": (32, 32)}
    pipe = pipeline(stage, lora_dir=str(tmp_path / "output"), **options)
    result = pipe(str(data / "3.png") if stage == STAGES[0] else rows[0]["video"], max_frames=2)
    assert result["lora"] == ["output"]
    figures = trainer.evaluate()
    assert list(figures) == ["loss"] and 0 < figures["loss"] < 10
    assert trainer.evaluate(str(trainer.run.checkpoints.paths()[-1])) == figures
    with pytest.raises(CheckpointError, match="adapter.safetensors' is damaged, or no checkpoint"):
        trainer.evaluate(str(tmp_path / "output" / "adapter.safetensors"))


def test_a_trainer_takes_a_modelscope_data_set(models, data, tmp_path):
    from modelscope.msdatasets import MsDataset
    from modelscope.trainers import build_trainer

    datasets = pytest.importorskip("datasets")
    rows = {"video": [str(data / f"{number}.mp4") for number in range(2)], "text": ["a", "b"]}
    arguments = {
        "model": str(models[STAGES[0]]), "work_dir": str(tmp_path), "steps": 1, "lora": 1, "size": (32, 32),
        "frames": 2, "clips": 1, "device": "cpu",
        "train_dataset": MsDataset.to_ms_dataset(datasets.Dataset.from_dict(rows)),
    }  # fmt: skip
    trainer = build_trainer("image-to-video-trainer", default_args=arguments)
    trainer.train()
    assert [clip.text for clip in trainer.run.clips] == ["a", "b"]
