"""A script of scripts/ as a module, for its tests."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@contextmanager
def script_module(name: str) -> Iterator[ModuleType]:
    """scripts/<name>.py, imported with the scripts that it imports; they are gone afterwards, so that each test file has its own."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
    yield module
    for loaded in [key for key, other in sys.modules.items() if Path(getattr(other, "__file__", None) or "").parent == SCRIPTS]:
        del sys.modules[loaded]
