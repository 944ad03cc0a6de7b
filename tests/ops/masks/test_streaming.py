"""StreamingLLM: the first tokens and a window."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.core.placement import Where
from regard.ops.masks.streaming import CARD, allow

WHERE = Where(layer=0, layers=2, heads=4, kv_heads=2, head_dim=8)


@given(st.integers(0, 6), st.integers(1, 9), st.integers(1, 20))
def test_allowed_pairs_are_sink_and_window(sink, window, total):
    told = allow(WHERE, sink=sink, window=window).to_dense(total)[0]
    for i in range(total):
        for j in range(total):
            assert told[i, j] == (j <= i and (j < sink or i - j < window))


@given(st.integers(0, 6), st.integers(1, 9))
def test_later_queries_need_sink_and_window_only(sink, window):
    (reach,) = allow(WHERE, sink=sink, window=window).reach()
    assert (reach.sink, reach.recent) == (sink, window)


def test_no_window_is_the_model_s_own_attention():
    assert CARD.neutral == {"window": None}
    assert allow(WHERE, sink=4, window=None).is_causal


def test_a_window_as_long_as_the_text_allows_all():
    assert torch.equal(allow(WHERE, sink=0, window=7).to_dense(7)[0], torch.ones(7, 7, dtype=torch.bool).tril())
