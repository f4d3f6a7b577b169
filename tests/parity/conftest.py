"""What the tests of equality with other implementations keep of what they measure."""

from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def record(record_property) -> Iterator[Callable[[str, float], None]]:
    """Keeps the largest difference of each kind with the test's result (`pytest --junit-xml`), and prints it."""
    largest: dict[str, float] = {}

    def keep(name: str, value: float) -> None:
        largest[name] = max(value, largest.get(name, 0.0))

    yield keep
    for name, value in largest.items():
        record_property(name, value)
    print("largest differences", {name: f"{value:.1e}" for name, value in largest.items()})
