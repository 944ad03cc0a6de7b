"""What every request of the contract tests is told."""

import pytest

from contracts.subjects import token_map
from regard.adapters.requests import Requests


@pytest.fixture(autouse=True)
def _reading(monkeypatch):
    """Requests under mechanisms that have to know their tokens are told; a map of its own is left."""
    own = Requests._said

    def said(self, batch, padding, stop, device):
        told = own(self, batch, padding, stop, device)
        if told is not None or self._aside or not any(slots and slots.needs for slots in self.slots):
            return told
        return token_map(batch, padding).to(device)

    monkeypatch.setattr(Requests, "_said", said)
