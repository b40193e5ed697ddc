"""Low-memory mode: networks take turns on the device."""

from __future__ import annotations

import pytest
import torch
from modelscope.pipelines import pipeline
from torch import nn

from modelscope_i2v.engine.devices import device_of, placed_on
from modelscope_i2v.engine.memory.estimate import choose_low_memory
from modelscope_i2v.settings.stages import ImageToVideoSettings


class Traveller(nn.Linear):
    """A network that notes where it is sent, and goes nowhere: no other device is needed."""

    def __init__(self):
        super().__init__(1, 1)
        self.visited = []

    def to(self, device):
        self.visited.append(torch.device(device))
        return self


def test_in_low_memory_mode_a_network_is_on_the_device_only_for_its_turn():
    network, device = Traveller(), torch.device("meta")
    with placed_on(network, device, low_memory=True) as where:
        assert where == device
        assert network.visited == [device]
    assert network.visited == [device, torch.device("cpu")]


def test_a_network_goes_home_after_a_failure_too():
    network = Traveller()
    with pytest.raises(KeyboardInterrupt), placed_on(network, torch.device("meta"), low_memory=True):
        raise KeyboardInterrupt
    assert network.visited[-1] == torch.device("cpu")


def test_otherwise_a_network_works_where_its_owner_put_it():
    network = Traveller()
    with placed_on(network, torch.device("meta"), low_memory=False) as where:
        assert where == torch.device("cpu") == device_of(network)
    assert network.visited == []


def test_the_setting_decides_and_auto_keeps_all_where_there_is_no_gpu():
    cpu = torch.device("cpu")
    assert choose_low_memory(ImageToVideoSettings(low_memory=True), cpu) is True
    assert choose_low_memory(ImageToVideoSettings(low_memory=False), cpu) is False
    assert choose_low_memory(ImageToVideoSettings(), cpu) is False


def test_it_changes_nothing_in_the_video(small_model, picture):
    plain, saving = (
        pipeline("image-to-video", model=str(small_model[0]), device="cpu", low_memory=low_memory)
        for low_memory in (False, True)
    )
    assert saving.model.stage.low_memory
    frames, saved = (pipe.generate(str(picture)).frames.astype(int) for pipe in (plain, saving))
    assert abs(frames - saved).max() <= 1  # decoded frame by frame, it is rounded otherwise


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_networks_are_gone_between_calls(small_model, picture):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    pipe = pipeline("image-to-video", model=str(small_model[0]), device="cuda", low_memory=True)
    pipe(str(picture))
    assert torch.cuda.memory_allocated() - before < 2**20
    assert device_of(pipe.model.generator).type == "cpu"
