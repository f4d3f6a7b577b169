"""Imports the package `evaluate`, even if a script of that name comes first on the path.

Python puts the folder of the running script first, so next to `examples/evaluate.py`, or a user's own `evaluate.py`, a
plain `import evaluate` would run the script. Metrics import the package from here.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _package_spec() -> ModuleSpec | None:
    # the first path entry with a package of that name; a script has no submodule locations
    for entry in sys.path:
        spec = PathFinder.find_spec("evaluate", [entry])
        if spec is not None and spec.submodule_search_locations and spec.origin:  # a folder with an __init__.py
            return spec
    return None


def import_evaluate() -> ModuleType:
    """Imports the package, once.

    Raises:
        ImportError: it is not installed, or a script was already imported under its name.
    """
    # already imported: as the package, or as a script
    known = sys.modules.get("evaluate")
    if known is not None and not hasattr(known, "__path__"):
        raise ImportError(f"the metrics need the package `evaluate`, but that name is taken by {known.__file__}")

    spec = _package_spec() if known is None else None
    if spec is None:
        return importlib.import_module("evaluate")

    # as in the import system: registered during execution, removed if it fails
    package = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["evaluate"]
        raise
    return package


evaluate = import_evaluate()
