"""Compiled or not: published wheels have the core as machine code beside its source; EXTPROC_PURE=1 takes the source.

Which modules are compiled says setup.py. Nothing else of the program knows.
"""

from __future__ import annotations

import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _Source:
    """Finds modules of this package as source, where Python itself would take machine code first."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is None or not name.startswith("extproc."):
            return None
        for entry in path:
            spec = FileFinder(entry, (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(name, target)
            if spec is not None and spec.loader is not None:
                return spec
        return None


def prefer_source() -> None:
    """From now on, import modules of this package as source."""
    sys.meta_path.insert(0, _Source)


def is_compiled() -> bool:
    """Tell whether the core is machine code here."""
    spec = find_spec("extproc.admission.placing")
    return spec is not None and not str(spec.origin).endswith(".py")
