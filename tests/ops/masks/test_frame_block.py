"""Frames as blocks and temporal ids [092]: the oracles of its sheet."""

import pytest
import torch

import regard
from lattices import agrees_with_flex, dense, is_covered
from regard import Pattern
from regard.ops.masks import frame_block
from regard.primitives.rotary import rotate

FRAMES = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1, 5, 5, -1])
DOUBLE = {"dtype": torch.float64}


def test_pairs_equal_a_loop_and_later_tokens_are_text():
    found = dense(frame_block.pattern(FRAMES), 20)
    for i in range(20):
        for j in range(20):
            same = max(i, j) < 15 and FRAMES[i] == FRAMES[j] >= 0
            assert bool(found[i, j]) == (j <= i or bool(same))


@pytest.mark.parametrize(("rows", "keys"), [(4, 4), (3, 5), (8, 2), (1, 1)])
def test_covers_are_exact(rows, keys):
    is_covered(frame_block.pattern(FRAMES), 20, rows, keys, exact=True)


@pytest.mark.parametrize("frames", [torch.arange(9), torch.full((9,), -1), torch.empty(0, dtype=torch.long)])
def test_one_token_a_frame_and_text_alone_are_causal(frames):
    assert torch.equal(dense(frame_block.pattern(frames), 9), dense(Pattern.causal(), 9))


def test_temporal_ids_advance_by_one_a_frame_and_by_one_a_token_of_text():
    assert frame_block.temporal_ids(FRAMES).tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7, 7, 8]


def test_positions_without_time_are_the_models_own_and_text_scales():
    assert torch.equal(frame_block.positions(FRAMES, gamma=0), torch.arange(15))
    text = torch.full((6,), -1)
    assert torch.equal(frame_block.positions(text, gamma=0.5), 1.5 * torch.arange(6, **DOUBLE))
    assert frame_block.positions(text).dtype == torch.int64


@pytest.mark.parametrize("gamma", [0.0, 1.0, 0.7])
def test_generated_text_goes_on_where_the_prompt_ended(gamma):
    longer = torch.cat((FRAMES, torch.full((4,), -1)))
    wanted = frame_block.positions(longer, gamma=gamma)[15:].tolist()
    assert [frame_block.next_position(FRAMES, n, gamma=gamma) for n in range(15, 19)] == pytest.approx(wanted)


def test_two_rotations_are_one_by_their_sum():
    x = torch.randn(1, 2, 15, 8, **DOUBLE)
    time = frame_block.temporal_ids(FRAMES)
    twice = rotate(rotate(x, torch.arange(15)[None]), 0.7 * time[None].double())
    torch.testing.assert_close(twice, rotate(x, frame_block.positions(FRAMES, gamma=0.7)[None]), atol=1e-12, rtol=0)


def test_scores_do_not_change_where_all_positions_shift():
    q, k = torch.randn(2, 1, 2, 15, 8, **DOUBLE).unbind(0)
    at = frame_block.positions(FRAMES)[None]
    scores = [rotate(q, p) @ rotate(k, p).transpose(-1, -2) for p in (at, at + 13)]
    torch.testing.assert_close(*scores, atol=1e-12, rtol=0)


def test_patches_of_a_frame_permute_their_outputs_and_leave_later_rows():
    q, k, v = torch.randn(3, 1, 2, 15, 8, **DOUBLE).unbind(0)
    order = torch.arange(15)
    order[5:8] = torch.tensor([7, 5, 6])
    pattern = frame_block.pattern(FRAMES)
    out = regard.attend(q, k, v, pattern=pattern)[0]
    moved = regard.attend(*(x[:, :, order] for x in (q, k, v)), pattern=pattern)[0]
    torch.testing.assert_close(moved, out[:, :, order], atol=1e-12, rtol=0)
    causal = [regard.attend(*(x[:, :, o] for x in (q, k, v)))[0] for o in (torch.arange(15), order)]
    assert (causal[1] - causal[0][:, :, order])[:, :, 5:8].abs().max() > 1e-3


def test_flex_attention_and_decoding_agree():
    agrees_with_flex(frame_block.pattern(FRAMES), 15)
    q, k, v = torch.randn(3, 1, 2, 18, 8, **DOUBLE).unbind(0)
    pattern = frame_block.pattern(FRAMES)
    whole = regard.attend(q, k, v, pattern=pattern)[0]
    for n in (15, 17):
        one = regard.attend(q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1], pattern=pattern)[0]
        torch.testing.assert_close(one, whole[:, :, n : n + 1], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("words", "frames"),
    [("frames must not fall: token 2 is of frame 0, after frame 1", torch.tensor([1, 1, 0])),
     ("frame 4 is in two pieces: text stands between its tokens, before token 3", torch.tensor([4, 4, -1, 4])),
     (r"frames must be integers \[T\]", torch.zeros(3)), (r"frames must be integers", torch.zeros(2, 3).long())],
)  # fmt: skip
def test_frames_that_do_not_fit_are_named(words, frames):
    for call in (frame_block.pattern, frame_block.temporal_ids, frame_block.positions):
        with pytest.raises(regard.RegardError, match=words):
            call(frames)


def test_bad_weights_and_places_are_named_and_long_positions_warned_of():
    with pytest.raises(regard.RegardError, match=r"gamma must be at least 0, got -1"):
        frame_block.positions(FRAMES, gamma=-1)
    with pytest.raises(regard.RegardError, match="index 14 is not past the 15 tokens"):
        frame_block.next_position(FRAMES, 14)
    with pytest.warns(UserWarning, match="positions reach 22 of 20 .* advances by 2 a token"):
        frame_block.positions(FRAMES, trained=20)
