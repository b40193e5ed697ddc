"""Adapters in use: read, refused, merged into the weights and taken out again."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_pipelines import STAGES, built, video_of
from test_lora import tiny_unet, trained
from tiny_networks import built as built_unet
from tiny_networks import inputs_of, normal

from modelscope_i2v import ImageToVideo, TwoStages, VideoToVideo
from modelscope_i2v.cli import main
from modelscope_i2v.errors import CheckpointError, InvalidInputError, MissingFileError
from modelscope_i2v.media.video import read_metadata
from modelscope_i2v.settings.configuration import load_settings
from modelscope_i2v.settings.request import Request
from modelscope_i2v.training.lora import save_adapter
from modelscope_i2v.weights.adapters import MergedAdapters, find_adapter, read_adapter

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop

ONE, TWO = STAGES
LAYER = "middle_block.1.transformer_blocks.0.attn1.to_q"
WEIGHT = f"{LAYER}.weight"

#: A call takes a tenth of a second.
SMALL = {"steps": 1, "max_frames": 2, "resolution": (32, 32)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two adapters of ``tiny_unet()``."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, alpha in ((1, 6), (2, 1.5)):
        unet = trained(tiny_unet(), 3, seed, alpha=alpha)
        save_adapter(unet, folder / f"{seed}.safetensors", {"stage": ONE})
    return sorted(folder.iterdir())


def state_of(unet) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in unet.state_dict().items()}


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def tensors(**changes) -> dict[str, torch.Tensor]:
    """An adapter of one layer, 32 wide, of rank 2."""
    parts = {"lora_A.weight": normal(2, 32), "lora_B.weight": normal(32, 2, seed=1), **changes}
    return {f"{LAYER}.{name}": each for name, each in parts.items() if each is not None}


def merged(path: Path, scale: float = 1.0, unet=None):
    unet = unet or tiny_unet()
    MergedAdapters(unet, ONE).use([(path, scale)])
    return unet


# Numbers


def test_merged_weights_compute_what_pefts_layers_do(files, without_gradients):
    wrapped, unet = trained(tiny_unet(), 3, 1, alpha=6), tiny_unet()
    inputs = inputs_of(unet, 2, 3, 10, 8)
    plain, expected = unet(**inputs), wrapped(**inputs)
    merged(files[0], unet=unet)
    ours = unet(**inputs)
    assert (ours - expected).norm() / expected.norm() < 1e-5
    assert (ours - plain).norm() / plain.norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_several_are_summed_by_their_scales(files, dtype):
    unet, scales = tiny_unet().to(dtype), (0.5, -2.0)
    before = unet.get_parameter(WEIGHT).clone()
    MergedAdapters(unet, ONE).use(list(zip(files, scales)))
    total = before.double()
    for path, scale, alpha in zip(files, scales, (6, 1.5)):
        state = load_file(path)
        down, up = (state[f"base_model.model.{LAYER}.lora_{part}.weight"].double() for part in "AB")
        total += scale * alpha / 3 * (up @ down)
    weight = unet.get_parameter(WEIGHT)
    assert weight.dtype == dtype
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (weight - total).norm() / total.norm() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_come_back_to_the_bit(files, dtype):
    unet = tiny_unet().to(dtype)
    before, adapters = state_of(unet), MergedAdapters(unet, ONE)
    adapters.use([(files[0], 0.8)])
    first = state_of(unet)
    adapters.use([(files[1], 0.3), (files[0], 1.7)])
    assert not same(state_of(unet), first)
    adapters.use([(files[0], 0.8)])
    assert same(state_of(unet), first) and not same(first, before)
    adapters.use([])
    assert same(state_of(unet), before)


def test_a_network_that_was_cast_meanwhile_gets_its_weights_cast(files):
    unet = tiny_unet()
    adapters = MergedAdapters(unet, ONE)
    adapters.use([(files[0], 1.0)])
    unet.half()
    adapters.use([])
    assert same(state_of(unet), state_of(tiny_unet().half()))


@pytest.mark.parametrize("rank", [0, 2], ids=["rank 0", "B = 0"])
def test_an_adapter_that_says_nothing_changes_nothing(tmp_path, rank):
    parts = {"lora_A.weight": normal(rank, 32), "lora_B.weight": torch.zeros(32, rank)}
    save_file(tensors(**parts), tmp_path / "nothing.safetensors")
    assert same(state_of(merged(tmp_path / "nothing.safetensors", 3.0)), state_of(tiny_unet()))


@pytest.mark.parametrize(
    "names",
    [
        "base_model.model.{}.lora_A.weight base_model.model.{}.lora_B.weight",
        "base_model.model.{}.lora_A.default.weight base_model.model.{}.lora_B.default.weight",
        "unet.{}.lora.down.weight unet.{}.lora.up.weight",
        "{}.lora_down.weight {}.lora_up.weight {}.alpha",
        "lora_unet_{_}.lora_down.weight lora_unet_{_}.lora_up.weight lora_unet_{_}.alpha",
    ],
)
def test_names_of_other_trainers_are_read(tmp_path, names):
    values = normal(2, 32), normal(32, 2, seed=1), torch.tensor(1.0)
    keys = [name.format(LAYER, _=LAYER.replace(".", "_")) for name in names.split()]
    save_file(dict(zip(keys, values)), tmp_path / "adapter.safetensors")
    [change] = read_adapter(tmp_path / "adapter.safetensors", tiny_unet(), ONE).values()
    assert torch.equal(change.up @ change.down, values[1] @ values[0])
    assert change.scale == (0.5 if "alpha" in names else 1)


def test_an_adapter_of_convolutions_is_merged(tmp_path):
    name = "input_blocks.1.0.in_layers.2"
    weight = tiny_unet().get_parameter(f"{name}.weight")
    down, up = normal(2, *weight.shape[1:]), normal(len(weight), 2, 1, 1, seed=1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
    change = torch.einsum("or,ricd->oicd", up[:, :, 0, 0], down)
    after = merged(tmp_path / "a.safetensors").get_parameter(f"{name}.weight")
    assert torch.allclose(after, weight + change, atol=1e-5)


def test_peft_itself_writes_what_is_read(tmp_path, without_gradients):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model = get_peft_model(tiny_unet(), config)
    model.save_pretrained(str(tmp_path))
    inputs = inputs_of(tiny_unet(), 1, 2, 8, 8)
    expected = model.base_model.model(**inputs)
    assert (merged(find_adapter(tmp_path))(**inputs) - expected).norm() / expected.norm() < 1e-5


# What does not fit


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (tensors(**{"lora_A.weight": normal(2, 24)}), r"of another shape .*down \[2, 24\], up \[32, 2\] for"),
        (tensors(**{"lora_B.weight": normal(32, 3)}), r"down \[2, 32\], up \[32, 3\] for \[32, 32\]"),
        (tensors(**{"lora_B.weight": None}), r"down \[2, 32\] for \[32, 32\]"),
        (tensors(**{"lora_A.weight": torch.ones(2, 32, dtype=torch.int64)}), "of another shape"),
        ({f"down.{LAYER}.lora_A.weight": normal(2, 32)}, "1 layers that the network has not .'down.middle"),
        (tensors(lora_magnitude_vector=normal(32)), "1 keys that are no LoRA's .*magnitude"),
        ({"weight": normal(3)}, "no LoRA's"),
        ({}, "it holds no tensors"),
        (tensors(**{"lora_A.weight": normal(2, 32) / 0}), "not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, contents, words):
    path, unet = tmp_path / "adapter.safetensors", tiny_unet()
    save_file(contents, path)
    before = state_of(unet)
    with pytest.raises(CheckpointError, match=words) as error:
        merged(path, unet=unet)
    assert str(path) in str(error.value) and same(state_of(unet), before)


def test_an_adapter_of_the_other_stage_is_refused(tmp_path):
    save_adapter(trained(tiny_unet("unet_v2v")), tmp_path / "a.safetensors", {"stage": TWO})
    with pytest.raises(CheckpointError, match=f"it was trained for {TWO}, and this is {ONE}"):
        merged(tmp_path / "a.safetensors")


@pytest.mark.parametrize("contents", [b"", b"<html></html>", b"PK\x03\x04", bytes(100)], ids=repr)
def test_what_is_no_adapter_is_refused(tmp_path, contents):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match="adapter.safetensors' cannot be used"):
        merged(path)


def test_a_cut_file_is_refused(files, tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(files[0].read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        merged(path)


@pytest.mark.parametrize(
    "config", ['{"lora_alpha": "x"}', '{"lora_alpha": 1e999}', "[]", "{", '{"use_dora": true}']
)
def test_a_configuration_that_says_no_alpha_is_refused(tmp_path, config):
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(CheckpointError, match="its alpha cannot be read|use_dora, which is not supported"):
        merged(find_adapter(tmp_path))


def test_a_scale_beyond_the_precision_leaves_the_network_as_it_was(files):
    unet = tiny_unet().half()
    before, adapters = state_of(unet), MergedAdapters(unet, ONE)
    adapters.use([(files[0], 1.0)])
    with pytest.raises(CheckpointError, match="not finite in fp16: use a smaller lora_scale"):
        adapters.use([(files[0], 1e6)])
    assert same(state_of(unet), before) and adapters.merged == ()


def test_a_folders_adapter_is_found(files, tmp_path):
    with pytest.raises(MissingFileError, match="no LoRA adapter 'nowhere'"):
        find_adapter("nowhere", tmp_path)
    with pytest.raises(MissingFileError, match="holds no .safetensors file"):
        find_adapter(tmp_path)
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="'a.safetensors', 'b.safetensors': give one of them"):
        find_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    assert find_adapter(tmp_path).name == "adapter_model.safetensors"
    assert find_adapter("a.safetensors", tmp_path) == tmp_path / "a.safetensors"


# Through the doors


@pytest.fixture(scope="module")
def output(small_model, tmp_path_factory) -> dict[str, Path]:
    """By stage of the tiny model, a folder with an adapter."""
    folders = {}
    for stage, model in zip(STAGES, small_model):
        folders[stage] = tmp_path_factory.mktemp("work") / "output"
        unet = trained(built_unet(load_settings(model, stage).unet))
        save_adapter(unet, folders[stage] / "adapter.safetensors", {"stage": stage, "base_model": "tiny"})
    return folders


@pytest.fixture(scope="module")
def first(small_model) -> ImageToVideo:
    return ImageToVideo.load(small_model[0], "cpu", **SMALL)


@pytest.fixture(scope="module")
def second(small_model) -> VideoToVideo:
    return VideoToVideo.load(small_model[1], "cpu", **SMALL)


@pytest.fixture(scope="module")
def plain(first, picture) -> bytes:
    return first(picture).to_bytes()


def test_a_call_has_its_adapters_and_the_next_has_none(first, plain, picture, output):
    strong, weak = (first(picture, lora=output[ONE], lora_scale=scale).to_bytes() for scale in (1.0, 0.5))
    assert len({plain, strong, weak}) == 3
    assert first(picture).to_bytes() == plain
    both = first(picture, lora=[output[ONE], str(output[ONE])], lora_scale=0.5)
    whole = first(picture, lora=output[ONE])  # the same but for rounding
    assert np.abs(both.frames.astype(int) - whole.frames).max() <= 1


def test_a_record_names_adapters_and_no_folders(first, picture, output, tmp_path):
    path = output[ONE] / "adapter.safetensors"
    video = first(picture, lora=path, lora_scale=0.5)
    assert (video.record["lora"], video.record["lora_scale"]) == (["adapter.safetensors"], (0.5,))
    assert video.record["lora_sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest()]
    metadata = read_metadata(video.save(tmp_path / "video.mp4"))
    assert json.loads(metadata["lora"]) == ["adapter.safetensors"]
    assert str(output[ONE]) not in json.dumps(metadata)
    assert not {"lora", "lora_scale", "lora_sha256"} & first(picture).record.keys()


@pytest.mark.parametrize("low_memory", [True, False])
def test_loading_with_adapters_is_calling_with_them(first, plain, picture, output, small_model, low_memory):
    stage = ImageToVideo.load(small_model[0], "cpu", **SMALL, lora=output[ONE], low_memory=low_memory)
    weights = state_of(stage.unet)
    expected = first(picture, lora=output[ONE])
    assert same(weights, state_of(first.unet)) and np.array_equal(stage(picture).frames, expected.frames)
    assert stage(picture, lora=[]).to_bytes() == plain
    assert not same(state_of(stage.unet), state_of(first.unet))


@pytest.mark.parametrize("stage", STAGES)
def test_a_pipeline_takes_modelscopes_word(stage, small_model, inputs, output):
    pipe = built(stage, small_model, **SMALL)
    adapted = built(stage, small_model, **SMALL, lora_dir=str(output[stage]), lora_scale=0.7)
    without = video_of(pipe(inputs[stage]))
    expected = video_of(pipe(inputs[stage], lora=output[stage], lora_scale=0.7))
    assert expected != without
    assert video_of(adapted(inputs[stage])) == expected
    assert video_of(adapted(inputs[stage], lora=[])) == without == video_of(pipe(inputs[stage]))
    other = STAGES[1 - STAGES.index(stage)]
    with pytest.raises(CheckpointError, match=f"trained for {other}"):
        pipe(inputs[stage], lora_dir=output[other])


def test_both_stages_have_their_own(first, second, small_model, picture, output):
    plain = TwoStages(first, second)
    stages = TwoStages.load(
        *small_model, device="cpu", **SMALL, lora=output[ONE], refine_lora=output[TWO], refine_lora_scale=0.5
    )
    video = stages.generate(picture)
    assert video.record["lora_scale"] == (0.5,) and video.first.record["lora_scale"] == (1.0,)
    called = {"lora": output[ONE], "refine_lora": output[TWO], "refine_lora_scale": 0.5}
    expected = plain.generate(picture, **called)
    assert np.array_equal(video.frames, expected.frames)
    assert not np.array_equal(expected.frames, plain.generate(picture).frames)


def test_a_call_in_flight_keeps_its_adapters(first, plain, picture, output):
    """While it denoises, another with other adapters waits."""
    expected = first(picture, steps=2, lora=output[ONE]).to_bytes()
    others, began = [], threading.Event()
    other = threading.Thread(target=lambda: (began.wait(), others.append(first(picture).to_bytes())))
    other.start()

    def callback(step, *_):
        began.set()
        other.join(0.2)

    assert first(picture, steps=2, lora=output[ONE], callback=callback).to_bytes() == expected
    other.join()
    assert others == [plain]


def test_half_precision_and_another_unet(small_model, picture, output):
    stage = ImageToVideo.load(small_model[0], "cpu", **SMALL, precision="bf16")
    plain = stage(picture).to_bytes()
    adapted = stage(picture, lora=output[ONE]).to_bytes()
    assert adapted != plain and stage.unet.dtype == torch.bfloat16
    assert stage(picture).to_bytes() == plain
    stage(picture, lora=output[ONE])
    first_unet = stage.unet
    stage.unet = ImageToVideo.load(small_model[0], "cpu", precision="bf16").unet
    assert stage(picture, lora=output[ONE]).to_bytes() == adapted
    stage.unet = first_unet
    assert stage(picture, lora=output[ONE]).to_bytes() == adapted
    assert stage(picture).to_bytes() == plain


def test_the_command_line_takes_several(first, picture, output, small_model, tmp_path, capsys):
    target, adapter = tmp_path / "video.mp4", str(output[ONE])
    call = ["generate", str(picture), "-o", str(target), "--model", str(small_model[0])]
    call += ["--steps", "1", "--frames", "2", "--size", "32x32"]
    both = ["--lora", adapter, "--lora-scale", "0.25", "--lora", adapter, "--lora-scale", "0.5"]
    assert main([*call, "--device", "cpu", *both]) == 0
    expected = first(picture, lora=[adapter, adapter], lora_scale=[0.25, 0.5])
    assert target.read_bytes() == expected.to_bytes()
    capsys.readouterr()
    assert main([*call, "--lora", str(output[TWO])]) == 1
    assert f"does not fit: it was trained for {TWO}" in capsys.readouterr().err
    assert main([*call, "--lora", "nowhere"]) == 2
    # Another made so, with the adapter named again: a video knows its name and not its place.
    again = ["generate", str(picture), "-o", str(tmp_path / "again.mp4"), "--model", str(small_model[0])]
    assert main([*again, "--like", str(target), "--device", "cpu"]) == 2
    assert "no LoRA adapter 'output'" in capsys.readouterr().err
    assert main([*again, "--like", str(target), "--device", "cpu", "--lora", adapter, "--lora", adapter]) == 0
    assert (tmp_path / "again.mp4").read_bytes() == target.read_bytes()


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"lora": 3}, "lora: got 3, allowed is a path, or a list of paths"),
        ({"lora": ""}, "lora: got ''"),
        (
            {"lora": ["a", "b"], "lora_scale": [1, 2, 3]},
            "got 3 numbers for 2 adapters, allowed is one, or as many",
        ),
        ({"lora_scale": float("nan")}, "lora_scale: got nan, allowed is a number from -10 to 10"),
    ],
)
def test_settings_of_adapters_are_checked(first, keywords, words):
    with pytest.raises(InvalidInputError, match=words):
        first.resolve(keywords)


def test_a_request_with_adapters_goes_through_json(second, output):
    request, _ = second.resolve({"lora": [output[TWO], output[TWO]], "lora_scale": [0.5, 2], "seed": 1})
    assert request.lora_scale == (0.5, 2.0)
    assert Request.from_json(request.to_json()) == request


def test_a_record_is_of_the_request_whatever_is_merged(first, second, picture, output):
    """Long work compares it with what it was begun with, before anything is merged."""
    request, _ = second.resolve({"lora": output[TWO], "seed": 1})
    before = second.record(request)
    digest = hashlib.sha256((output[TWO] / "adapter.safetensors").read_bytes()).hexdigest()
    assert before["lora_sha256"] == [digest]
    second(first(picture), lora=[output[TWO], output[TWO]], seed=1)
    assert second.record(request) == before
