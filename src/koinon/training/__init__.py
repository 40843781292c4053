"""LOCAL TRAINING: what a site does with a model and its data, declared per framework or as a plain function."""

from koinon.training.function import Function, task

__all__ = ["Function", "task"]
