"""docs/reported_elsewhere.md names tests that there are, and each report once."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reported_elsewhere.md").read_text(encoding="utf-8")
ROWS = [line.strip("|").split("|") for line in PAGE.splitlines() if re.match(r"\| [\w.-]+/", line)]


def test_every_test_that_is_named_is_there():
    named = [found for row in ROWS for found in re.findall(r"`(tests/[^`:]+)::([^`]+)`", row[2])]
    assert named
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_every_report_has_repository_number_and_kind_once():
    reports = []
    for row in ROWS:
        repository = None
        for one in row[0].strip().split(", "):
            # `#2` alone is of the repository before it
            repository, number = one.split("#") if not one.startswith("#") else (repository, one[1:])
            reports.append(f"{repository}#{number}")
    assert len(ROWS) >= 30 and len(set(reports)) == len(reports)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", report) for report in reports)
    assert all(len(row) == 3 and row[1].strip() for row in ROWS)
