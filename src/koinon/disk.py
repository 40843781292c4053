"""What is on the disk survives that the machine dies."""

from __future__ import annotations

import os
from pathlib import Path


def settle(*paths: Path) -> None:
    """Have files, and folders' lists of names, on the disk.  Many together cost little more than one."""
    for path in paths:
        at = os.open(path, os.O_RDONLY)
        try:
            os.fsync(at)
        finally:
            os.close(at)
