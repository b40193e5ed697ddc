"""Compiled blocks: the same result, compiled once for a size, and an error where it cannot be."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from modelscope.pipelines import pipeline
from tiny_networks import TINY, built, inputs_of

from modelscope_i2v.engine.compilation import CompiledBlocks
from modelscope_i2v.errors import MissingPackageError
from modelscope_i2v.models.unet import UNetConfig
from modelscope_i2v.samplers.schedules import NoiseLevel

pytestmark = pytest.mark.slow  # as a whole: left out of the fast loop


@pytest.fixture(autouse=True)
def nothing_compiled_before(without_gradients):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def unet_of(*dim_mult: int):
    return built(UNetConfig(**{**TINY, "dim_mult": dim_mult}))


LEVEL = NoiseLevel(999, 0.1, 0.995, 9.95)


def velocity_of(unet):
    inputs = inputs_of(unet, 1, 3, 8, 8)
    return inputs["x"], lambda x, level: unet(x, torch.tensor([level.t]), inputs["y"])


def test_torch_compile_gives_the_same(caplog):
    x, plain = velocity_of(unet_of(1))
    unet = unet_of(1)
    names = list(unet.state_dict())
    compiled = CompiledBlocks(unet)
    assert list(unet.state_dict()) == names
    _, velocity = velocity_of(unet)
    with caplog.at_level("INFO"):
        compiled.prepare([velocity], x, LEVEL)
    blocks = sum(name.endswith("norm1.weight") for name in names)
    assert f"compiled {blocks} blocks for latents [1, 4, 3, 8, 8] in " in caplog.text
    assert relative_error(velocity(x, LEVEL), plain(x, LEVEL)) < 1e-5


def test_each_size_is_compiled_once(caplog):
    unet = unet_of(1, 1, 2, 2)
    compiled = CompiledBlocks(unet, backend="eager")
    x, velocity = velocity_of(unet)
    calls = []

    def counted(x, level):
        calls.append(tuple(x.shape))
        return velocity(x, level)

    for size in (8, 8, 16, 8):
        compiled.prepare([counted], torch.zeros(1, 4, 3, 8, size), LEVEL)
    assert calls == [(1, 4, 3, 8, 8), (1, 4, 3, 8, 16)]
    with torch.compiler.set_stance("fail_on_recompile"):  # all variants are there
        velocity(x, LEVEL)


def test_where_it_cannot_compile_that_is_an_error():
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nsecond line")

    unet = unet_of(1)
    compiled = CompiledBlocks(unet, backend=broken)
    x, velocity = velocity_of(unet)
    with pytest.raises(MissingPackageError, match="compile: torch.compile does not work here: .*to false"):
        compiled.prepare([velocity], x, LEVEL)


def test_the_setting_compiles_and_says_how_long_it_took(small_model, picture, caplog, monkeypatch):
    monkeypatch.setattr("modelscope_i2v.engine.stage.CompiledBlocks", eager_blocks)
    pipe = pipeline("image-to-video", model=str(small_model[0]), device="cpu", compile=True)
    plain = pipeline("image-to-video", model=str(small_model[0]), device="cpu")
    modes = {"reuse_interval": 2, "guidance_interval": [300, 999]}
    with caplog.at_level("INFO"):
        generated = pipe.generate(str(picture), **modes)
    blocks = sum(name.endswith("norm1.weight") for name in pipe.model.generator.state_dict())
    assert "compiling" in generated.seconds
    assert f"compiled {blocks} blocks" in caplog.text
    expected = plain.generate(str(picture), **modes).frames.astype(int)
    assert abs(generated.frames.astype(int) - expected).max() <= 1


def eager_blocks(unet):
    """Traced and called as they are: compiling all variants of a network takes a minute."""
    return CompiledBlocks(unet, backend="eager")
