"""The recurrence of a cell and its loss: a readable definition, and a fast implementation of it."""

from engine.dispatch import ENGINES, PRECISIONS, Engine

__all__ = ["ENGINES", "PRECISIONS", "Engine"]
