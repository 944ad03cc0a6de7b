"""What a layer remembers of a request."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.primitives.memory import Memory


def filled():
    memory = Memory()
    memory.set("state", torch.arange(24.0).reshape(3, 2, 4))
    memory.set("tail", torch.arange(3)[:, None])
    memory.advance(5)
    return memory


def test_names_and_bytes():
    memory = filled()
    assert memory.get("nothing") is None
    assert memory.rows == 3
    assert memory.nbytes == 24 * 4 + 3 * 8
    state = memory.get("state")
    # Views of one storage count once, and count all of it.
    memory.set("view", state[:, :1])
    assert memory.nbytes == 24 * 4 + 3 * 8
    memory.reset()
    assert (memory.seen, memory.nbytes, memory.rows) == (0, 0, None)


def test_rows_move_together():
    memory = filled()
    memory.reorder(torch.tensor([2, 0]))
    assert memory.get("tail").tolist() == [[2], [0]]
    assert memory.get("state")[0, 0, 0] == 16
    memory.repeat(2)
    assert memory.get("tail").tolist() == [[2], [2], [0], [0]]
    memory.select(torch.tensor([False, True, True, False]))
    assert memory.get("tail").tolist() == [[2], [0]]
    assert memory.seen == 5


def test_keys_grow():
    memory = Memory()
    for tokens in (3, 1):
        keys, values = memory.update(torch.ones(2, 1, tokens, 4), torch.ones(2, 1, tokens, 6))
    assert keys.shape == (2, 1, 4, 4)
    assert values.shape == (2, 1, 4, 6)


def test_what_is_refused():
    memory = filled()
    memory.crop(0)
    with pytest.raises(RegardError, match="cannot remove the last 2 of 5 tokens: a recurrent state"):
        memory.crop(2)
    with pytest.raises(RegardError, match="go back 1 tokens"):
        memory.advance(-1)
    with pytest.raises(RegardError, match="'new' has 4 batch rows, this request has 3"):
        memory.set("new", torch.zeros(4, 1))
    with pytest.raises(RegardError, match="batch dimension"):
        memory.set("new", torch.tensor(1.0))
    with pytest.raises(RegardError, match="1 or more times, got 0"):
        memory.repeat(0)
    assert memory.seen == 5
    assert memory.get("new") is None
