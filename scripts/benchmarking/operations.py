"""Where the time of a step goes, by kind of operation."""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .timing import synchronize

#: Kinds with what the names of their operations look like; the first that fits counts.
_KINDS = (
    ("attention", r"attention|softmax|bmm|flash"),
    ("convolution", r"conv(olution|\d|_|$)"),
    ("norm", r"norm"),
    ("linear", r"^(add)?mm$|linear|matmul|gemm"),
    ("copies", r"copy|contiguous|clone|cat|pad|upsample|reorder|fill_|zero|repeat|index|memcpy|memset|pin"),
    (
        "elementwise",
        r"add|sub|mul|div|neg|silu|gelu|sigmoid|exp|log|pow|sqrt|rsqrt|sin|cos|std|sum|mean|where|clamp"
        r"|lerp|triton|fused",
    ),
)
OTHER = "other"
KINDS = (*(kind for kind, _ in _KINDS), OTHER)


def kind_of(operation: str) -> str:
    """The kind of an operation, by its name in PyTorch's profiler (``aten::addmm``)."""
    name = operation.rpartition("::")[2].lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), OTHER)


class StepProfile:
    """PyTorch's profiler between ``start`` and ``stop``."""

    def __init__(self, device: torch.device):
        self.device = device
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    def start(self) -> None:
        synchronize(self.device)
        self._profile.start()

    def stop(self) -> None:
        synchronize(self.device)
        self._profile.stop()

    def seconds(self) -> dict[str, dict[str, float]]:
        """Seconds of each operation by itself, by kind and name; on CUDA, of the kernels it started."""
        found: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in KINDS}
        for event in self._profile.key_averages():
            if event.device_type != DeviceType.CPU:
                continue  # a kernel, which counts with the operation that started it
            if self.device.type == "cpu":
                microseconds = event.self_cpu_time_total
            elif hasattr(event, "self_device_time_total"):
                microseconds = event.self_device_time_total
            else:  # its name before torch 2.4
                microseconds = event.self_cuda_time_total
            found[kind_of(event.key)][event.key] += microseconds / 1e6
        return found

    def table(self, title: str) -> str:
        """Kinds, seconds, shares, and the operations that take most of each."""
        found = self.seconds()
        total = sum(sum(operations.values()) for operations in found.values()) or 1.0
        lines = [f"{title}: {total:.3f} s in operations"]
        for kind, operations in sorted(found.items(), key=lambda item: -sum(item[1].values())):
            seconds = sum(operations.values())
            largest = sorted(operations, key=operations.__getitem__, reverse=True)[:3]
            named = ", ".join(f"{name.rpartition('::')[2]} {operations[name]:.3f}" for name in largest)
            lines.append(f"  {kind:<12} {seconds:>8.3f} s {100 * seconds / total:>5.1f} %   {named}")
        return "\n".join(lines)
