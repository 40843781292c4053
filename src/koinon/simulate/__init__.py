"""MANY SITES HERE: virtual sites in one process."""

from koinon.simulate.simulate import simulate

__all__ = ["simulate"]
