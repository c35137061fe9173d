"""What ran on a card during a stretch of work: how long it was busy, with how many kernels, and with which."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace; others are annotations and calls of the host
ATTENTION = re.compile(
    "flash|fmha|sdpa|attention|attn|dot_do_o|convert_dq|qkv_tma", re.IGNORECASE
)  # cuDNN's helpers are last
LONGEST = 40  # kernels that are listed by name


class Kernel(NamedTuple):
    """A kernel, a copy or a fill of memory, with its times in microseconds."""

    name: str
    begin: float
    end: float


class Recorder:
    """Records what runs on the card between `start` and `stop`.

    Args:
        trace: file for the profiler's trace.
    """

    def __init__(self, trace: Path):
        self.trace = trace
        self.profile = profile(activities=[ProfilerActivity.CUDA])

    def start(self) -> None:
        self.profile.start()

    def stop(self) -> list[Kernel]:
        """Stop once the device is done with its work. Returns what ran."""
        self.profile.stop()
        self.profile.export_chrome_trace(str(self.trace))
        return read_kernels(self.trace)


def read_kernels(trace: Path) -> list[Kernel]:
    """Read what ran on the card from a trace in Chrome's format, as torch's profiler writes it."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    work = (event for event in events if event.get("cat") in WORK)
    return [Kernel(event["name"], event["ts"], event["ts"] + event["dur"]) for event in work]


def busy_ms(kernels: Iterable[Kernel]) -> float:
    """Milliseconds in which at least one of the kernels ran."""
    busy, until = 0.0, -math.inf
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        busy += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return busy / 1000


def summarise(kernels: list[Kernel]) -> dict:
    """Figures of an update: milliseconds the card was busy, with all kernels and with attention's; the number of
    kernels; and the LONGEST by name, each with its count and the sum of its milliseconds."""
    by_name = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.end - kernel.begin)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "busy_ms": busy_ms(kernels),
        "attention_ms": busy_ms(kernel for kernel in kernels if ATTENTION.search(kernel.name)),
        "kernels": len(kernels),
        "longest": [{"name": name, "count": len(times), "ms": sum(times) / 1000} for name, times in longest],
    }
