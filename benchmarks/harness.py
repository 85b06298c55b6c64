"""What the benchmarks share: cases that take turns, ratios, and JSON lines with hardware, versions and commit."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def take_turns(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, round by round, so that a machine that slows down slows all cases."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speed_ratio(seconds: Mapping[str, Sequence[float]], case: str) -> dict[str, Any]:
    """The speed of a case over that of the first case: the median over rounds, and the range."""
    first = next(iter(seconds))
    ratios = [a / b for a, b in zip(seconds[first], seconds[case], strict=True)]
    spread = [round(min(ratios), 3), round(max(ratios), 3)]
    return {f"ratio_to_{first}": round(statistics.median(ratios), 3), "ratio_range": spread}


def peak_bytes() -> int:
    """The process' peak resident memory, pages of mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def emit(line: Mapping[str, Any], *packages: str) -> None:
    """Print one line of JSON, with the machine, the commit and the versions of `packages`."""
    print(json.dumps(dict(line) | machine(*packages)), flush=True)


def machine(*packages: str) -> dict[str, str]:
    """Accelerator (where JAX is loaded), processor, cores, Python, versions, and commit ("+": with local changes)."""
    found = {}
    if jax := sys.modules.get("jax"):
        found["device"] = f"{jax.default_backend()} {jax.devices()[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found |= {"hardware": _processor(), "cores": str(cores), "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "-s", "-uno") else "")}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*command: str) -> str:
    """What git prints; "" where there is no git or no repository."""
    try:
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except FileNotFoundError:
        return ""
