"""RAT [135]: the oracles of its sheet, against a loop over tokens."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from regard.core.errors import RegardError
from regard.ops.states.rat import scan
from regard.primitives import sdpa
from regard.primitives.elementwise import stepwise
from regard.primitives.rotary import rotate


def made(T, B=2, G=2, H=4, D=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, G, T, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    v = torch.randn(B, H, T, D, generator=g, dtype=torch.float64).to(dtype)
    gate = torch.rand(B, H, T, D, generator=g, dtype=torch.float64).to(dtype)
    return q, k, v, gate


def tiled(x, heads):
    return torch.stack([x[:, h % x.shape[1]] for h in range(heads)], 1)


def looped(q, k, v, gate, chunk, base=10000.0):
    """One token after the other, from the sheet: softmax over the concatenated list."""
    _, H, T, D = v.shape
    q, k = tiled(q, H), tiled(k, H)
    out = torch.zeros_like(v)
    ends_k, ends_v, was = [], [], (0, 0)
    for t in range(T):
        at = torch.tensor([[t // chunk]])
        g, own = gate[:, :, t], (k[:, :, t], v[:, :, t])
        key, value = was = [(1 - g) * x + (0 if t % chunk == 0 else g * y) for x, y in zip(own, was, strict=True)]
        turned = rotate(key[:, :, None], at, base)
        keys, values = torch.cat([*ends_k, turned], 2), torch.cat([*ends_v, value[:, :, None]], 2)
        scores = rotate(q[:, :, t : t + 1], at, base) @ keys.transpose(2, 3) / D**0.5
        out[:, :, t] = (scores.softmax(-1) @ values)[:, :, 0]
        if t % chunk == chunk - 1:
            ends_k.append(turned)
            ends_v.append(value[:, :, None])
    return out


def near(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("T", [1, 3, 4, 5, 12, 13, 33])
@pytest.mark.parametrize("chunk", [1, 4, 5, 40])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_equals_the_loop(T, chunk, backend):
    call = made(T)
    found, state = scan(*call, chunk=chunk, backend=backend)
    near(found, looped(*call, chunk))
    assert state.keys.shape[2] == state.values.shape[2] == -(-T // chunk)


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_and_no_positions(groups):
    call = made(19, G=groups)
    near(scan(*call, chunk=4, base=None)[0], looped(*call, 4, base=None))


def test_one_chunk_is_the_gated_recurrence():
    q, k, v, gate = made(21)
    near(scan(q, k, v, gate, chunk=21)[0], stepwise(gate, (1 - gate) * v)[0])


def test_its_states_equal_flash_linear_attention():
    hgrn = pytest.importorskip("fla.ops.hgrn.naive")
    q, k, v, gate = made(21, dtype=torch.float32)
    flat = [x.flatten(0, 1) for x in ((1 - gate) * v, gate.log())]
    wanted, _ = hgrn.naive_recurrent_hgrn(*flat)
    near(scan(q, k, v, gate, chunk=32)[0].flatten(0, 1), wanted, 1e-5)


def test_chunks_of_one_are_softmax_attention():
    """With keys (1 - g) k and values (1 - g) v; with gates of 0 it is the plain one."""
    q, k, v, gate = made(17)
    for g in (gate, torch.zeros_like(gate)):
        keys = rotate((1 - g) * tiled(k, 4), torch.arange(17)[None])
        queries = rotate(tiled(q, 4), torch.arange(17)[None])
        wanted = F.scaled_dot_product_attention(queries, keys, (1 - g) * v, is_causal=True)
        near(scan(q, k, v, g, chunk=1)[0], wanted)


@pytest.mark.parametrize("splits", [[1] * 23, [7, 1, 1, 9, 5], [4, 4, 15], [16, 1, 1, 1, 1, 1, 1, 1], [3, 20]])
def test_any_split_into_calls(splits):
    call = made(23)
    wanted, end = scan(*call, chunk=4)
    state, parts = None, []
    with torch.no_grad():
        for part in zip(*(x.split(splits, 2) for x in call), strict=True):
            out, state = scan(*part, chunk=4, initial_state=state)
            parts.append(out)
            assert state.keys.shape[2] == -(-state.seen // 4)
    near(torch.cat(parts, 2), wanted)
    for found, known in zip(state[:4], end[:4], strict=True):
        near(found, known)


@pytest.mark.parametrize("pads", [([3, 0], [0, 5]), ([6, 1], [0, 0])])
def test_padding_changes_nothing(pads):
    """Rows with their own lengths, padding on either side, then more tokens in every way."""
    left, right = pads
    call, more = made(12, seed=1), made(9, seed=2)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    for row in range(2):
        mask[row, left[row] : 12 - right[row]] = True
    wanted = []
    for row in range(2):
        real = [torch.cat([x[row : row + 1][:, :, mask[row]], y[row : row + 1]], 2) for x, y in zip(call, more)]  # noqa: B905
        wanted.append(looped(*real, 4))
    for splits in ([9], [1] * 9, [1, 5, 1, 2]):
        out, state = scan(*call, chunk=4, mask=mask)
        assert not out.transpose(1, 2)[~mask].any()
        parts = []
        with torch.no_grad():
            for part in zip(*(x.split(splits, 2) for x in more), strict=True):
                later, state = scan(*part, chunk=4, initial_state=state)
                parts.append(later)
        later = torch.cat(parts, 2)
        for row in range(2):
            near(torch.cat([out[row][:, mask[row]], later[row]], 1), wanted[row][0])
    assert state.count.tolist() == (mask.sum(1) + 9).tolist()


def test_a_row_of_padding_alone_stays_as_it_was():
    call, more = made(6), made(3, seed=5)
    _, state = scan(*call, chunk=4)
    mask = torch.tensor([[True] * 3, [False] * 3])
    out, after = scan(*more, chunk=4, initial_state=state, mask=mask)
    assert not out[1].any()
    assert torch.equal(after.key[1], state.key[1])
    assert torch.equal(after.keys[1, :, :2], state.keys[1])
    assert after.count.tolist() == [9, 6]


def test_packed_sequences_are_their_own():
    call, cuts = made(29, B=1), [0, 3, 4, 16, 29]
    out, state = scan(*call, chunk=4, cu_seqlens=torch.tensor(cuts))
    for i, (a, b) in enumerate(pairwise(cuts)):
        part = [x[:, :, a:b] for x in call]
        wanted, end = scan(*part, chunk=4)
        near(out[:, :, a:b], wanted)
        near(state.key[i], end.key[0])
        near(state.keys[i, :, : end.keys.shape[2]], end.keys[0])
    assert state.count.tolist() == [3, 1, 12, 13]


def test_causal_and_chunks_speak_through_their_ends():
    """Later tokens change nothing; two histories with one chunk end are the same to later chunks."""
    q, k, v, gate = made(20)
    wanted, _ = scan(q, k, v, gate, chunk=5)
    for x in (q, k, v, gate):
        other = x.clone()
        other[:, :, 12:] = 0.5
        found, _ = scan(*(other if y is x else y for y in (q, k, v, gate)), chunk=5)
        near(found[:, :, :12], wanted[:, :, :12])
    gate = gate.clone()
    gate[:, :, 4] = 0
    end = scan(q, k, v, gate, chunk=5)[0]
    changed = v.clone()
    changed[:, :, :4] += 1
    found, _ = scan(q, k, changed, gate, chunk=5)
    near(found[:, :, 4:], end[:, :, 4:])
    assert (found[:, :, :4] - end[:, :, :4]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("T", "chunk", "backend"),
    [
        (7, 3, "auto"),
        (7, 3, "reference"),
        (3, 4, "auto"),
        (4, 1, "auto"),
    ],
)
def test_gradients(T, chunk, backend):
    call = [x.requires_grad_() for x in made(T, B=1, G=1, H=2, D=2)]
    assert torch.autograd.gradcheck(lambda *x: scan(*x, chunk=chunk, backend=backend, check=False)[0], call)


def test_gradients_through_padding_and_a_state():
    call = [x.requires_grad_() for x in made(7, B=2, G=1, H=2, D=2)]
    mask = torch.tensor([[False] + [True] * 4, [True] * 3 + [False] * 2])

    def run(*x):
        out, state = scan(*(y[:, :, :5] for y in x), chunk=2, mask=mask, check=False)
        more, _ = scan(*(y[:, :, 5:] for y in x), chunk=2, initial_state=state, check=False)
        return out, more

    assert torch.autograd.gradcheck(run, call)


def test_no_mask_is_built_and_no_key_repeated(monkeypatch):
    """What reaches torch's kernel: one head of keys for all tokens of a chunk, T / C rows of them, no float mask."""
    seen, kernel = [], sdpa._forward

    def spy(q, k, v, added, square, *rest):
        seen.append((q.shape, k.shape, added, square))
        return kernel(q, k, v, added, square, *rest)

    monkeypatch.setattr(sdpa, "_forward", spy)
    scan(*(x.requires_grad_() for x in made(64)), chunk=8)
    assert seen == [((8, 8, 7, 4), (8, 1, 7, 4), None, True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    call = made(70, dtype=dtype)
    found, state = scan(*call, chunk=16)
    assert found.dtype == dtype
    assert state.key.dtype == torch.float32
    assert (found.double() - looped(*(x.double() for x in call), 16)).abs().max() < 0.05


def test_what_a_state_holds_is_all_it_keeps_alive():
    _, state = scan(*made(64), chunk=16)
    assert state.keys.untyped_storage().nbytes() == state.keys.numel() * 8
    assert state.values.untyped_storage().nbytes() == state.values.numel() * 8
    assert state.value.untyped_storage().nbytes() == state.value.numel() * 8


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"chunk": 0}, "at least 1, got 0"),
        ({"q": torch.rand(2, 3, 9, 4), "k": torch.rand(2, 3, 9, 4)}, "4 value heads are not a multiple of 3"),
        ({"k": torch.rand(2, 2, 8, 4)}, r"q, k must be"),
        ({"gate": torch.full((2, 4, 9, 4), 1.5)}, "0..1, got 1.5 to 1.5"),
        ({"mask": torch.ones(2, 8)}, r"bool \[B, T\]"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "one batch row"),
        ({"initial_state": scan(*made(5, dtype=torch.float32), chunk=3)[1]}, "one entry for 3 tokens.*chunk=4"),
        ({"backend": "referenz"}, "reference"),
    ],
)
def test_errors(change, match):
    call = dict(zip(("q", "k", "v", "gate"), made(9, dtype=torch.float32), strict=True)) | {"chunk": 4} | change
    with pytest.raises(RegardError, match=match):
        scan(**call)


@pytest.mark.parametrize("cuts", [[0, 5], [1, 9], [0, 4, 4, 9], [0, 6, 3, 9]])
def test_packed_lengths_are_checked(cuts):
    with pytest.raises(RegardError, match="rise from 0 to T = 9"):
        scan(*made(9, B=1), cu_seqlens=torch.tensor(cuts))
