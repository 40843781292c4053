"""The examples as commands; one whose framework or data are not here skips the test that asks for it."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def command(request, name, arguments, data):
    """`koinon run` of an example, with its data if it takes any."""
    if name not in ("fedprox", "numpy_only"):
        framework = {"jax_digits": "jax", "keras_digits": "tensorflow"}.get(name, "torch")
        pytest.importorskip(framework, reason="its framework is not installed")
    if data:
        folder = request.getfixturevalue("shared_data") / data
        if not folder.is_dir():
            pytest.skip(f"there is no {folder}")
        arguments = [*arguments, "--set", f"data={folder.resolve()}"]
    return [sys.executable, "-m", "koinon.operate.cli", "run", str(EXAMPLES / f"{name}.py"), *arguments]
