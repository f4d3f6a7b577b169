"""A pytest plugin: what our code calls of a dependency that is about to lose it, listed at the end of the run.

A warning of deprecation names a line that its author chose by `stacklevel`. Here it is moved to the line of ours that
called the dependency, if one did without another package between, so that it is seen and belongs to somebody. It fails
no test, for whoever runs an older release is right to. `--fail-on-deprecations`, meant for the newest releases, fails
the run. What is not ours to mend is ignored by name, in setup.cfg.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("modeling", "processing", "training", "oner", "examples", "tests")
KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# between a module that warns when imported, and who imports it
IMPORTING = ("importlib", "_frozen_importlib", "_frozen_importlib_external")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-deprecations", action="store_true", help="our use of what is deprecated fails the run")
    parser.addini(
        "deprecations_of", "folders whose lines are ours", type="paths", default=[ROOT / one for one in ROOMS]
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Deprecations(config), "deprecations")


class Deprecations:
    """Moves the warnings where they arise, and gathers them in the process that reports."""

    def __init__(self, config: pytest.Config):
        self.ours = tuple(f"{folder}/" for folder in config.getini("deprecations_of"))
        self.fails = config.getoption("fail_on_deprecations")
        self.found: dict[tuple[str, int, str], str] = {}  # where and what -> the test that saw it first

    def line_of_ours(self, frame: FrameType | None) -> tuple[str, int] | None:
        """File and line of ours that called the package of `frame` with no other package between; None if none did."""
        package = None
        while frame is not None:
            if frame.f_code.co_filename.startswith(self.ours):
                return frame.f_code.co_filename, frame.f_lineno
            name = frame.f_globals.get("__name__", "").partition(".")[0]
            if name not in IMPORTING:
                package = package or name
                if name != package:
                    return None
            frame = frame.f_back
        return None

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Within pytest's own catching of warnings, which takes what `show` is given."""
        show = warnings.showwarning

        def showwarning(message, category, filename, lineno, file=None, line=None) -> None:
            if issubclass(category, KINDS) and not filename.startswith(self.ours):
                # above this function stands warnings.py, and above that who warned
                filename, lineno = self.line_of_ours(sys._getframe(1).f_back) or (filename, lineno)
            show(message, category, filename, lineno, file, line)

        warnings.showwarning = showwarning
        try:
            yield
        finally:
            warnings.showwarning = show

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self):
        with self.moving():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        with self.moving():
            return (yield)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        if issubclass(warning_message.category, KINDS) and warning_message.filename.startswith(self.ours):
            text = f"{warning_message.category.__name__}: {warning_message.message}"
            self.found.setdefault((warning_message.filename, warning_message.lineno, text), nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.found:
            terminalreporter.section("deprecated, and called by us")
        for (filename, lineno, text), nodeid in sorted(self.found.items()):
            terminalreporter.line(f"{filename}:{lineno}: {text}")
            terminalreporter.line(f"    first in {nodeid or 'an import'}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.found and self.fails and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
