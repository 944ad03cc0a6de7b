"""What every request of the contract tests is told."""

import pytest

from contracts.subjects import telling


@pytest.fixture(autouse=True)
def _reading():
    with telling():
        yield
