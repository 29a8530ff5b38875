"""`mixturelens doctor`: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from mixturelens.cli.shared import app

ENOUGH = 4e9
"""Bytes of memory, free, with which a model of 135 million parameters can be measured."""
ROOM = 2e9
"""Bytes of disk for records and a repaired checkpoint of that size."""


class Finding(NamedTuple):
    """One thing that was looked at; `mend`, where something is missing, says what to do."""

    what: str
    found: str
    mend: str = ""


@app.command()
def doctor() -> None:
    """Say which versions, device, threads and memory there are, what is missing, and what mends it."""
    from mixturelens.cli.tables import print_table

    found = [*_python(), *_libraries(), *_device(), *_room()]
    print_table(("what", "found", "to do"), [tuple(each) for each in found])
    if any(each.mend and not each.mend.startswith("only") for each in found):
        raise SystemExit(1)


def _python() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    return [Finding("Python", platform.python_version(), "" if good else "install Python 3.11 or later")]


def _libraries() -> list[Finding]:
    """Those that pyproject.toml asks for, against what is installed."""
    from packaging.requirements import Requirement

    found = [Finding("mixturelens", importlib.metadata.version("mixturelens"))]
    for line in importlib.metadata.requires("mixturelens") or []:
        wanted = Requirement(line)
        extra = str(wanted.marker or "").partition("extra == ")[2].strip("\"'")
        if extra not in ("", "lab", "real") or wanted.name == "mixturelens":
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            lab = f"only for the laboratory: in a clone, pip install '.[{extra}]'"
            mend = lab if extra else f"pip install '{line}'"
            found.append(Finding(wanted.name, "not installed", mend))
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        found.append(Finding(wanted.name, version, "" if fits else f"pip install '{wanted.name}{wanted.specifier}'"))
    return found


def _device() -> list[Finding]:
    import torch

    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    much = f"only a hint: OMP_NUM_THREADS={cores} is quicker" if threads > cores else ""
    found = [Finding("threads", f"{threads} of {cores} cores", much)]
    if not torch.cuda.is_available():
        return [*found, Finding("GPU", "none: everything runs on the CPU")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(Finding(f"cuda:{index}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    return found


def _room() -> list[Finding]:
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        free, total = (int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
        less = "" if free >= ENOUGH else "close what takes memory, or give --memory GB, with which less is looked at"
        found.append(Finding("memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", less))
    disk = shutil.disk_usage(Path.cwd())
    full = "" if disk.free >= ROOM else "free some, or give --out on another disk"
    return [*found, Finding("disk", f"{disk.free / 1e9:.1f} GB free here", full), *_hub()]


def _hub() -> list[Finding]:
    """Where hub ids are loaded from."""
    from huggingface_hub import constants

    offline = "; offline: only what is there is found" if constants.HF_HUB_OFFLINE else ""
    return [Finding("cache of hub ids", f"{constants.HF_HUB_CACHE}{offline}")]
