"""A job file is plain Python: `job = koinon.Job(…)`, or a function `job(setting=default, …)` that returns one.

The function's parameters are the job's settings; their annotations and defaults say what they take.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from koinon.errors import EXTRAS, JobError, KoinonError, MissingExtra, SettingsError, nearest
from koinon.task import Job

if TYPE_CHECKING:
    from koinon.site.bundle import Order

PREFIX = "koinon_job_"
"""Of a job file's name as a module: what it defines travels by value, as nobody else could import it."""


def ordered(order: Order, path: Path, home: Path | None = None) -> Job:
    """The job in a file, as it is wanted; see `load`."""
    job = load(path, order.settings, seed=order.seed, home=home)
    job = job.with_rounds(order.rounds) if order.rounds else job
    return job.fast() if order.fast else job


def load(path: Path, settings: Mapping[str, str], *, seed: int | None = None, home: Path | None = None) -> Job:
    """The job in a file.

    Args:
        path: of the job file.
        settings: name -> text, as given on the command line; converted to the parameter's type.
        seed: handed to the job function if it has a parameter `seed`.
        home: the folder whose modules it may import; by default its own.

    Raises:
        JobError: there is no such file, it raises, or it holds no job.
        SettingsError: a setting is unknown (the nearest known one is named) or of the wrong type.
    """
    made = getattr(module(path, home or path.parent), "job", None)
    if isinstance(made, Job):
        if settings:
            name = next(iter(settings))
            raise SettingsError(f"{path.name} has no settings, as its job is a value: make it def job({name}=…)")
        return made
    if not callable(made):
        raise JobError(f"{path} holds no job: write `job = koinon.Job(…)` or `def job(…): return koinon.Job(…)`")
    arguments = _arguments(made, settings)
    if seed is not None and "seed" in inspect.signature(made).parameters:
        arguments.setdefault("seed", seed)
    job = _guarded(path, lambda: made(**arguments))
    if not isinstance(job, Job):
        raise JobError(f"job() in {path} returned a {type(job).__name__}, not a koinon.Job")
    return job


def module(path: Path, home: Path) -> ModuleType:
    """The job file as a module; its home is importable, as a script's folder is."""
    if not path.is_file():
        beside = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise JobError(f"there is no job file '{path}': {nearest(path.name, beside)}")
    spec = importlib.util.spec_from_file_location(f"{PREFIX}{path.stem}", path)
    if spec is None or spec.loader is None:
        raise JobError(f"'{path}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and typing look their module up
    sys.path.insert(0, str(home.resolve()))
    _guarded(path, lambda: spec.loader.exec_module(module) if spec.loader else None)
    return module


def _guarded(path: Path, call: Callable[[], Any]) -> Any:
    """What the user's file raises, told in one line with the place."""
    try:
        return call()
    except KoinonError:
        raise
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if bringing := [name for name, modules in EXTRAS.items() if library in modules]:
            raise MissingExtra(f"{path} needs {library}: pip install 'koinon[{bringing[0]}]'") from error
        raise JobError(f"{path}: {error}: is it installed here?") from error
    except SyntaxError as error:
        raise JobError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        where = f", line {own[-1].lineno}" if own else ""
        raise JobError(f"{path}{where}: {type(error).__name__}: {error}") from error


def _arguments(function: Callable[..., Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """Text to the types that the parameters ask for."""
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in (*settings, "seed"):
            raise SettingsError(f"this job needs a setting '{name}': give --set {name}=VALUE")
    arguments = {}
    for name, text in settings.items():
        if name not in parameters:
            raise SettingsError(f"this job has no setting '{name}': {nearest(name, parameters)}")
        default = parameters[name].default
        wanted = hints.get(name, str if default in (None, inspect.Parameter.empty) else type(default))
        arguments[name] = _convert(name, text, wanted)
    return arguments


def _convert(name: str, text: str, wanted: Any) -> Any:
    for value in (lambda: text, lambda: msgspec.json.decode(text)):  # 0.5, then [1, 2]
        try:
            return msgspec.convert(value(), wanted, strict=False)
        except (msgspec.ValidationError, msgspec.DecodeError):
            continue
    raise SettingsError(f"{name}={text}: a value of type {getattr(wanted, '__name__', wanted)} is needed")
