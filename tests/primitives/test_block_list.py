"""Block lists against the dense relation they stand for."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.primitives.block_list import build

PATTERNS = [
    Pattern.full(),
    Pattern.prefix(70),
    Pattern.causal(),
    ~Pattern.causal(),
    Pattern.window(50) | Pattern.sink(3),
    Pattern.predicate(lambda q, k, h: (q * 7 + k * k) % 3 == 0),
    Pattern.stack_heads([Pattern.window(9), Pattern.causal()]),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(("rows", "keys"), [(300, 300), (100, 333), (1, 64)])
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (16, 32)])
def test_a_block_list_is_its_pattern_by_row_and_by_key(pattern, rows, keys, size):
    blocks = build(pattern, torch.arange(keys - rows, keys)[None], torch.arange(keys)[None], size)
    dense = pattern.to_dense(rows, keys)[None]
    assert torch.equal(blocks.to_dense(), dense)
    assert torch.equal(blocks.turned().to_dense(), dense)
    back = blocks.turned().turned()
    for name in ("full", "count", "index", "part"):
        assert torch.equal(getattr(back, name), getattr(blocks, name))


def test_a_size_that_does_not_exist_is_refused():
    at = torch.arange(8)[None]
    with pytest.raises(RegardError, match="128"):
        build(Pattern.causal(), at, at, (48, 64))
