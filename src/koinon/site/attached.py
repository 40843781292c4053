"""What an attached script says: `receive` and `send`, for the executor `Script` that has started it.

A byte on its line says that there is a file to read: `task` from the job, `answer` from the script, both with arrays as
safetensors; the line's end, that the job is over.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from koinon.data import SiteData
from koinon.data.own import Own
from koinon.data.split import unpacked
from koinon.errors import JobError
from koinon.payload import Arrays, codec
from koinon.task import Context

LINE = "KOINON_LINE"
"""The variable that tells a script its line's number and the folder of its files."""


@dataclass
class Received(Context):
    """What a script gets: as every executor `task`, `site`, `round`, `data`, `state`, `stream()` and `number()`, and
    the model's `arrays` by name, its own to write on, and the `values` that came along."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


def receive() -> Received | None:
    """In a script: wait for the next task; None when the job is over.

    Raises:
        JobError: this is no script of a job, or it has not answered what it received last.
    """
    line = _line()
    if line.asked:
        raise JobError(f"the task '{line.asked.task}' is not answered yet: koinon.send(…) before koinon.receive()")
    if not line.socket.recv(1):
        return None
    said = codec.unpack((line.folder / "task").read_bytes())
    said["arrays"] = {name: np.array(array) for name, array in said["arrays"].items()}
    line.asked = Received(data=line.data, **said)
    return line.asked


def send(model: Arrays | None = None, *, samples: float, **metrics: float) -> None:
    """In a script: answer what was received.

    Args:
        model: the trained arrays, or PyTorch's tensors, under the names that they came with; none of an evaluation.
        samples: how many it was trained or evaluated on: its weight in the mean.
        metrics: numbers to record.

    Raises:
        JobError: nothing was received that is not answered.
    """
    line = _line()
    if line.asked is None:
        raise JobError("koinon.send() answers what koinon.receive() gave: nothing was received since the last one")
    said = {
        "kind": "metrics" if model is None else "weights",
        "arrays": {name: np.asarray(_on_cpu(array)) for name, array in (model or {}).items()},
        "values": {"weight": float(samples), "metrics": {name: float(value) for name, value in metrics.items()}},
    }
    (line.folder / "answer").write_bytes(codec.pack({"payload": said, "state": line.asked.state}))
    line.asked = None
    line.socket.sendall(b".")


class _Line:
    """To the job."""

    def __init__(self) -> None:
        if LINE not in os.environ:
            raise JobError("this script runs by itself: name it in a job, koinon.Script('…'), and run that")
        number, _, folder = os.environ.pop(LINE).partition(":")
        self.socket, self.folder = socket.socket(fileno=int(number)), Path(folder)
        self.socket.set_inheritable(False)
        self.asked: Received | None = None
        held = codec.unpack((self.folder / "data").read_bytes())
        sets = {part: unpacked(held["arrays"], held["about"], part) for part in held["about"]}
        self.data = Own(held["own"]) if held["own"] else SiteData(sets.get("train"), sets.get("test"))


_line = cache(_Line)


def _on_cpu(array: Any) -> Any:
    return array.detach().cpu() if hasattr(array, "detach") else array
