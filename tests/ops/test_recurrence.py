"""`regard.scan`: padding, packing, backends, single tokens, and what it refuses."""

import itertools
import sys

import pytest
import torch

import regard
from recurrences import KINDS, close, cut, decays, states, strengths, tokens
from regard.core.errors import RegardError
from regard.ops import recurrence
from regard.primitives.recurrence import stepwise

FORMS = ("stepwise", "quadratic", "chunked")
CASES = list(itertools.product(KINDS, [False, True]))


def made(kind="token", delta=True, rows=None, **sizes):
    """q, k, v and the keywords of one call."""
    q, k, v = tokens(**sizes)
    gates = {"decay": decays(kind, q, v), "beta": strengths(v)}
    return (q, k, v), {**gates, "delta": delta, "scale": 0.3, "initial_state": states(q, v, rows)}


def part(inputs, call, start, stop):
    """Some tokens of a call."""
    gates = {name: cut(call[name], start, stop) for name in ("decay", "beta")}
    return tuple(cut(x, start, stop) for x in inputs), {**call, **gates}


@pytest.mark.parametrize(("kind", "delta"), CASES)
def test_backends_are_equal(kind, delta):
    inputs, call = made(kind, delta, T=70)
    wanted = stepwise(*inputs, **call)
    for backend in ("auto", *FORMS):
        close(regard.scan(*inputs, **call, backend=backend), wanted)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize(("kind", "delta"), CASES)
def test_padding_on_either_side(kind, delta, backend):
    """Rows of different lengths, padded left and right with nonsense, equal themselves alone; so do gradients."""
    inputs, call = made(kind, delta, B=3, T=20)
    spans = [(0, 20), (7, 20), (2, 11)]
    mask = torch.zeros(3, 20, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = True
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan).requires_grad_() for x in inputs]
    gates = {}
    for name in ("decay", "beta"):
        x = call[name]
        hide = None if x is None or x.dim() == 1 else ~mask[:, None].reshape(3, 1, 20, *[1] * (x.dim() - 3))
        gates[name] = x if hide is None else x.masked_fill(hide, 7.0)
    out, state = regard.scan(*dirty, **{**call, **gates}, mask=mask, backend=backend)
    assert not out.masked_select(~mask[:, None, :, None]).any()
    (out.sum() + state.sum()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in dirty)
    for row, (start, stop) in enumerate(spans):
        own, more = part(inputs, call, start, stop)
        own = [x[row : row + 1].detach().requires_grad_() for x in own]
        more = {n: x[row : row + 1] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for n, x in more.items()}
        wanted = regard.scan(*own, **more)
        close((out[row : row + 1, :, start:stop], state[row : row + 1]), wanted)
        (wanted[0].sum() + wanted[1].sum()).backward()
        for x, y in zip(dirty, own, strict=True):
            torch.testing.assert_close(x.grad[row : row + 1, :, start:stop], y.grad)


@pytest.mark.parametrize("backend", ["auto", *FORMS])
@pytest.mark.parametrize(("kind", "delta"), CASES)
def test_packed_sequences_are_separate(kind, delta, backend):
    inputs, call = made(kind, delta, B=1, T=30, rows=3)
    cuts = [0, 1, 18, 30]
    out, state = regard.scan(*inputs, **call, cu_seqlens=torch.tensor(cuts, dtype=torch.int32), backend=backend)
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        own, more = part(inputs, call, start, stop)
        wanted = regard.scan(*own, **{**more, "initial_state": call["initial_state"][i : i + 1]})
        close((out[:, :, start:stop], state[i : i + 1]), wanted)


@pytest.mark.parametrize(("kind", "delta"), CASES)
def test_a_text_in_parts_is_the_text(kind, delta):
    inputs, call = made(kind, delta)
    wanted = regard.scan(*inputs, **call)
    outs = []
    for start, stop in ((0, 5), (5, 6), (6, 37)):
        own, more = part(inputs, call, start, stop)
        out, call["initial_state"] = regard.scan(*own, **more)
        outs.append(out)
    close((torch.cat(outs, 2), call["initial_state"]), wanted)


@pytest.mark.parametrize(("kind", "delta"), CASES)
def test_steps_are_the_scan(kind, delta):
    inputs, call = made(kind, delta, T=6)
    wanted = regard.scan(*inputs, **call)
    state = call.pop("initial_state")
    held, outs = state.data_ptr(), []
    for t in range(6):
        own, more = part(inputs, call, t, t + 1)
        outs.append(recurrence.step(*own, **more, state=state))
    assert state.data_ptr() == held
    assert not outs[0].requires_grad
    close((torch.cat(outs, 2), state), wanted)


def test_the_past_does_not_see_the_future():
    inputs, call = made(T=40)
    wanted = regard.scan(*inputs, **call)[0]
    changed = [torch.cat([x[:, :, :25], torch.randn_like(x[:, :, 25:])], 2) for x in inputs]
    torch.testing.assert_close(regard.scan(*changed, **call)[0][:, :, :25], wanted[:, :, :25])


@pytest.mark.parametrize("backend", ["auto", *FORMS])
def test_empty(backend):
    inputs, call = made(T=0)
    out, state = regard.scan(*inputs, **call, backend=backend)
    assert out.shape == (2, 4, 0, 3)
    assert torch.equal(state, call["initial_state"])
    inputs, call = made(T=0, B=1, rows=0)
    out, state = regard.scan(*inputs, **call, cu_seqlens=torch.tensor([0]), backend=backend)
    assert (out.shape, state.shape) == ((1, 4, 0, 3), (0, 4, 5, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    inputs, call = made()
    given = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = regard.scan(*(x.to(dtype) for x in inputs), **given)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    wanted = regard.scan(*(x.to(dtype).double() for x in inputs), **call)
    torch.testing.assert_close(state.double(), wanted[1], atol=1e-5, rtol=1e-5)


BAD = {
    "positive decay": ({"decay": torch.full((2, 4, 37), 0.1)}, r"at most 0 .*got 0.1 at \[0, 0, 0\]"),
    "NaN decay": ({"decay": torch.full((4,), torch.nan)}, r"at most 0 .*got nan at \[0\]"),
    "shape of decay": ({"decay": torch.zeros(2, 4, 36)}, r"\[4\] or \[2, 4, 37\] or \[2, 2, 37, 5\].*got \[2, 4, 36\]"),
    "kind of decay": ({"decay": torch.zeros(4, dtype=torch.int64)}, "decay must be float"),
    "beta above 2": ({"beta": torch.full((2, 4, 37), 2.5)}, r"lie in \[0, 2\]; got 2.5"),
    "negative beta": ({"beta": torch.full((2, 4, 37), -0.5)}, r"lie in \[0, 2\]; got -0.5"),
    "NaN beta": ({"beta": torch.full((2, 4, 37), torch.nan)}, "got nan"),
    "beta above 1": ({"beta": torch.full((2, 4, 37), 1.5), "delta": False}, r"lie in \[0, 1\]; got 1.5"),
    "beta above what is told": ({"beta": torch.full((2, 4, 37), 1.5), "beta_max": 1.0}, r"\[0, 1\]; got 1.5"),
    "shape of beta": ({"beta": torch.zeros(2, 37, 4)}, r"\[B, H, T\] = \[2, 4, 37\], got \[2, 37, 4\]"),
    "shape of state": ({"initial_state": torch.zeros(2, 4, 3, 5)}, r"must be \[2, 4, 5, 3\].*got \[2, 4, 3, 5\]"),
    "dtype of state": ({"initial_state": torch.zeros(2, 4, 5, 3).half()}, r"float32, got .*float16"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 37])}, "B must be 1, got 2"),
    "mask and packed": (
        {"cu_seqlens": torch.tensor([0, 37]), "mask": torch.ones(2, 37, dtype=torch.bool)},
        "not both",
    ),
    "kind of mask": ({"mask": torch.ones(2, 37)}, r"bool and \[B, T\] = \[2, 37\]"),
    "shape of mask": ({"mask": torch.ones(2, 36, dtype=torch.bool)}, r"\[2, 37\], got \[2, 36\]"),
    "unknown backend": ({"backend": "chunkd"}, "Did you mean 'chunked'"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    written, words = BAD[case]
    q, k, v = tokens(dtype=torch.float32)
    with pytest.raises(RegardError, match=words):
        regard.scan(q, k, v, **{"delta": True, **written})


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ([0, 5, 5, 37], "must increase, got 5, 5 at 1, 2"),
        ([0, 20, 10, 37], "must increase, got 20, 10"),
        ([0, 36], "end with T = 37, got 0 and 36"),
        ([1, 37], "begin with 0 .*, got 1 and 37"),
        ([0.0, 37.0], "int32 or int64"),
        ([[0, 37]], "int32 or int64"),
        ([], "int32 or int64"),
    ],
)
def test_refuses_cuts(cuts, words):
    with pytest.raises(RegardError, match=words):
        regard.scan(*tokens(B=1), cu_seqlens=torch.tensor(cuts))


def test_refuses_a_state_of_another_number_of_sequences():
    q, k, v = tokens(B=1)
    with pytest.raises(RegardError, match=r"must be \[2, 4, 5, 3\]"):
        regard.scan(q, k, v, initial_state=states(q, v, 1), cu_seqlens=torch.tensor([0, 5, 37]))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 2, 8, 4), (1, 2, 7, 4), (1, 2, 8, 4)), "disagree"),
        (((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 7, 4)), "disagree"),
        (((1, 2, 8, 4), (1, 2, 8, 3), (1, 2, 8, 4)), "disagree"),
        (((1, 2, 8, 4), (1, 1, 8, 4), (1, 2, 8, 4)), "disagree"),
        (((2, 8, 4), (2, 8, 4), (2, 8, 4)), "disagree"),
        (((1, 3, 8, 4), (1, 3, 8, 4), (1, 4, 8, 4)), "4 value heads on 3 key heads.*such as 3"),
    ],
)
def test_refuses_shapes(shapes, words):
    with pytest.raises(RegardError, match=words):
        regard.scan(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16", "float32"), ("int64", "int64", "int64")])
def test_refuses_dtypes(dtypes):
    q, k, v = (torch.zeros(1, 2, 8, 4, dtype=getattr(torch, name)) for name in dtypes)
    with pytest.raises(RegardError, match="share one floating dtype"):
        regard.scan(q, k, v)


def test_values_are_not_read_where_that_is_declined():
    q, k, v = tokens(dtype=torch.float32)
    regard.scan(q, k, v, decay=torch.full((4,), 0.1), check=False)


def test_steps_refuse():
    q, k, v = tokens(T=2)
    with pytest.raises(RegardError, match="one token, got T = 2"):
        recurrence.step(q, k, v, state=states(q, v))
    q, k, v = tokens(T=1)
    with pytest.raises(RegardError, match=r"must be \[2, 4, 5, 3\]"):
        recurrence.step(q, k, v, state=states(q, v, 1))


class Kernel:
    """Stands in for a Triton kernel."""

    def __init__(self, reason):
        self.reason = reason

    def refuses(self, q, k, v, *, decay, beta, delta, initial_state, cu_seqlens):
        return self.reason

    def scan(self, q, k, v, *, decay, beta, delta, scale, initial_state, cu_seqlens):
        return "ran", scale


def test_a_named_backend_never_falls_back(monkeypatch):
    q, k, v = tokens()
    monkeypatch.setitem(sys.modules, "regard.kernels.states.scan", Kernel("head dimension 5; it takes 64, 128 or 256"))
    with pytest.raises(RegardError, match=r"'triton' refuses: head dimension 5; .* Use backend='chunked' or 'auto'"):
        regard.scan(q, k, v, backend="triton")
    assert recurrence.choose(q, k, v) == ("chunked", "the tensors are on cpu")
    monkeypatch.setitem(sys.modules, "regard.kernels.states.scan", Kernel(None))
    assert regard.scan(q, k, v, scale=0.5, backend="triton") == ("ran", 0.5)


def test_without_triton_the_kernel_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "regard.kernels.states.scan", None)
    with pytest.raises(RegardError, match="'triton' refuses: its kernel cannot be loaded"):
        regard.scan(*tokens(), backend="triton")


def test_transitions_never_stretch():
    """Unit keys and beta up to 2: `(I - beta k k^T) exp(decay)` has spectral norm at most 1."""
    inputs, _ = made(B=1, Hk=1, H=1, T=1, D=6, Dv=6)
    state = torch.eye(6, dtype=torch.float64)[None, None]
    for beta in (0.0, 0.5, 1.0, 2.0):
        decay = decays("key channel", *inputs[::2])
        call = {"beta": torch.full((1, 1, 1), beta, dtype=torch.float64), "delta": True, "initial_state": state}
        moved = regard.scan(inputs[0], inputs[1], torch.zeros_like(inputs[2]), decay=decay, **call)[1]
        assert torch.linalg.matrix_norm(moved[0, 0], 2) <= 1 + 1e-12
