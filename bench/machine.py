"""The machine: what it is called, and how fast it can read, write, divide and multiply on one core.

How the limits are measured
---------------------------
Each is the best of many repetitions, since other programs can only slow a loop down.

read            dynquant's scale of a whole array, which does nothing but read, or NumPy's maximum, whichever
                is faster, on float32 buffers of half an L2 cache, a quarter of an L3 cache, and four times
                the L3 cache (at least 64 MiB, at most 1 GiB), which are kept in main memory.
write           the faster of ndarray.fill and of multiplying the same buffer in place, of which only the
                written half is counted.
copy            numpy.copyto between two such buffers, bytes read and written together.
divides         the faster of dynquant's and NumPy's division of rows by column factors, in place on
                128 x 1024 floats, which a core reads and writes faster than it divides.
multiply_adds   NumPy's product of two float32 matrices of 512 x 512.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dynquant as dq
from dynquant import _isa

LEVELS = ("l2", "l3", "dram")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe() -> dict[str, Any]:
    """CPU, cores, caches, system and Python."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "caches": cache_sizes(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def text(described: dict[str, Any], limits: dict[str, Any]) -> str:
    """What `describe` and `measure_limits` return, to be printed."""
    lines = ["{cpu}, {cores} cores, {os}, Python {python}".format(**described)]
    for level in LEVELS:
        rates = [f"{name} {limits[level][name] / 1e9:.0f} GB/s" for name in ("read", "write", "copy")]
        lines.append(f"{level:5}{', '.join(rates)}  ({limits[level]['bytes'] >> 10:,} KiB)")
    rates = [f"{limits[name] / 1e9:.1f} G {name}/s" for name in ("divides", "multiply_adds")]
    return "\n".join([*lines, f"core {', '.join(rates)}"])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches; where the system does not tell, those of a common server core."""
    sizes = {"l1": 32 << 10, "l2": 1 << 20, "l3": 32 << 20}
    for folder in CACHES.glob("index*"):
        if (folder / "type").read_text().strip() != "Instruction":
            level = "l" + (folder / "level").read_text().strip()
            sizes[level] = int((folder / "size").read_text().strip().removesuffix("K")) << 10
    return sizes


def level_of(footprint: int) -> str:
    """Where so many bytes stay between two calls: "l2", "l3" or "dram"."""
    sizes = cache_sizes()
    return next((level for level in ("l2", "l3") if footprint <= sizes[level]), "dram")


def measure_limits(isa: str, seconds: float) -> dict[str, Any]:
    """Bytes or operations a second, with `seconds` spent on each loop, those of dynquant on `isa`."""
    _isa.select(isa)
    sizes = cache_sizes()
    dram = min(max(4 * sizes["l3"], 64 << 20), 1 << 30)
    buffers = dict(zip(LEVELS, (sizes["l2"] // 2, sizes["l3"] // 4, dram), strict=True))
    return {
        **{level: _bandwidths(size, seconds) for level, size in buffers.items()},
        "divides": _divides(seconds),
        "multiply_adds": _multiply_adds(seconds),
    }


def _best(call: Callable[[], Any], seconds: float) -> float:
    """The least time of one call; samples of less than half a millisecond are lengthened."""
    call()
    end = time.perf_counter() + seconds
    repeats, best = 1, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        took = time.perf_counter() - start
        best = min(best, took / repeats)
        if took < 5e-4:
            repeats *= 2
    return best


def _bandwidths(size: int, seconds: float) -> dict[str, float]:
    x = np.ones(size // 4, np.float32)
    y = np.ones_like(x)
    reads = (lambda: dq.compute_scale(x, 127), x.max)
    writes = (lambda: y.fill(0), lambda: np.multiply(y, np.float32(1), out=y))
    return {
        "bytes": size,
        "read": size / min(_best(call, seconds) for call in reads),
        "write": size / min(_best(call, seconds) for call in writes),
        "copy": 2 * size / _best(lambda: np.copyto(y, x), seconds),
    }


def _divides(seconds: float) -> float:
    x, factors = np.ones((128, 1024), np.float32), np.ones(1024, np.float32)
    calls = (
        lambda: dq.smooth_activations(x, factors, out=x),
        lambda: np.divide(x, factors, out=x),
    )
    return x.size / min(_best(call, seconds) for call in calls)


def _multiply_adds(seconds: float) -> float:
    x = np.ones((512, 512), np.float32)
    out = np.empty_like(x)
    return 512**3 / _best(lambda: np.matmul(x, x, out=out), seconds)
