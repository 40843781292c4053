"""What all tests share: where data of this project's developers lie, how hypothesis runs, and that Ctrl-C works."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A slow machine is no failure, and a run in CI draws the same cases every time.
settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")

# A shell has what it starts in the background ignore Ctrl-C, and so would all that these tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: KOINON_DATA, or `../shared/data` beside the checkout.  Skips without it."""
    folder = Path(os.environ.get("KOINON_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: name their folder in KOINON_DATA")
    return folder
