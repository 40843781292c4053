"""A room whose names are loaded when they are first used: who only serves, or only asks, loads no numerics."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def names_of(package: str, *modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package: a name is a module of it, or stands in one of these, which are tried in turn."""

    def load(name: str) -> Any:
        if not name.startswith("_"):
            if importlib.util.find_spec(f"{package}.{name}"):
                return importlib.import_module(f"{package}.{name}")
            for module in modules:
                found = importlib.import_module(f"{package}.{module}")
                if hasattr(found, name):
                    return getattr(found, name)
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return load
