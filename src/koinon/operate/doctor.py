"""What a job will do on this machine, before it does it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from typing import Any

from koinon.data import Source, Split
from koinon.errors import EXTRAS, SettingsError, extra
from koinon.payload import Arrays, Payload, codec, tree
from koinon.simulate.processes import cores
from koinon.site import forms, inline
from koinon.task import Job


def machine() -> dict[str, Any]:
    """Versions, extras, cores, memory and GPU of this machine, as plain values."""
    found: dict[str, Any] = {
        "koinon": metadata.version("koinon"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": cores(),
        "memory_gb": _memory_gb(),
        "disk_free_gb": round(shutil.disk_usage(".").free / 2**30, 1),
    }
    for name, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        found[f"extra {name}"] = f"missing: pip install 'koinon[{name}]'" if missing else "installed"
    found["gpu"] = _gpu()
    return found


def job(job: Job, seed: int = 0) -> dict[str, Any]:
    """What a job exchanges: its arrays, what becomes of each, what leaves a site, and its data.

    Raises:
        KoinonError: the job cannot start; the message says why.
    """
    model = job.first_model(seed)
    kept = job.upload.keeps(frozenset(model))
    floating = tree.floating(model)
    leaving = {name: array for name, array in floating.items() if name not in kept}
    return {
        "settings": job.describe(),
        "arrays": [_array(name, array, name in kept) for name, array in model.items()],
        "notes": _notes(model),
        "forms": forms(inline(job)),
        "down_bytes": codec.size(Payload("weights", model)),
        "up_bytes_unfiltered": codec.size(Payload("weight_diff", leaving)),
        "up_filters": job.upload.name,
        "server_sees": "the sum of the updates only" if job.upload.shows == "sum" else "each site's update",
        "data": _data(job),
    }


def _array(name: str, array: Any, kept: bool) -> dict[str, Any]:
    fate = "averaged"
    if array.dtype.kind != "f":
        fate = "not averaged: stays as it is"
    elif kept:
        fate = "never leaves its site"
    return {"name": name, "shape": list(array.shape), "type": str(array.dtype), "bytes": array.nbytes, "fate": fate}


def _notes(model: Arrays) -> list[str]:
    """What people stumble over."""
    normed = [name for name in model if name.endswith(("running_var", "moving_variance"))]
    if not normed:
        return []
    return [
        f"{len(normed)} batch norms: their running statistics are averaged with the weights, their counters are "
        "not. Where sites differ much, a group norm is steadier."
    ]


def _data(job: Job) -> dict[str, Any]:
    if isinstance(job.data, Source):
        return {"source": job.data.name}
    if isinstance(job.data, Split):
        return dict(job.data.describe())
    if job.data is None:
        return {"source": "none: give data= to simulate()"}
    raise SettingsError(f"data= is a {type(job.data).__name__}; a koinon.data source or split is needed")


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu() -> str:
    """Asked of PyTorch, where it is installed."""
    if importlib.util.find_spec("torch") is None:
        return "unknown without PyTorch"
    torch = extra("torch", "torch")
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "none"
