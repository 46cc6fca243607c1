"""Packages that only some formats need, and what is said where one is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeAlias

from ..errors import MissingPrerequisite

__all__ = ["Package", "needed"]

Package: TypeAlias = Any
"""A package that need not be here, and what comes out of it: nothing is known of its types."""


def needed(module: str, what: str, extra: str) -> Package:
    """The module, for the format or verb `what`; raises MissingPrerequisite."""
    try:
        return import_module(module)
    except ImportError as exc:
        package = module.partition(".")[0]
        raise MissingPrerequisite(
            f"{what} needs the Python package {package}, which cannot be imported: {exc}",
            remedy=f"pip install 'qmp-memlistener[{extra}]'",
        ) from exc
