"""The gated recurrence by its kernels, against plain torch in float64: interpreted, or compiled on a GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import regard
from recurrences import KINDS, decays, states, strengths, tokens
from regard.core.errors import RegardError
from regard.kernels import device
from regard.kernels.states import scan as kernel
from regard.kernels.states.problem import CHUNK
from regard.kernels.states.segments import cut
from running import DEVICE, drawn, filled_with_nan

# The norm of an error over the norm of what is right. The interpreter cuts a bfloat16 off where a GPU rounds it, and
# the triangles of the delta rule are bfloat16 for float16 too.
FLOATS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3 if DEVICE == "cuda" else 1e-2}
# Decays get the small difference of large sums.
OF_DECAYS = {torch.float32: 3, torch.bfloat16: 8, torch.float16: 8}
CASES = list(itertools.product(KINDS, [False, True]))


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Where there is no GPU, `regard.scan` refuses kernels; the interpreter runs them all the same."""
    if DEVICE == "cpu":
        monkeypatch.setattr(device, "refuses", lambda tensor: None)


def made(kind, delta, rows=None, **sizes):
    """Names to the tensors of one call, in float64."""
    q, k, v = tokens(**{"B": 1, "Hk": 1, "H": 1, "T": 70, "D": 16, "Dv": 16, **sizes})
    beta = strengths(v) if delta else None
    return {"q": q, "k": k, "v": v, "decay": decays(kind, q, v), "beta": beta, "initial_state": states(q, v, rows)}


def inside(x):
    """The same numbers with heads inside tokens, as projections make them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x


def results(given, weights, **options):
    """Outputs and gradients by name. An output whose weight is None is not in the loss."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out, state = regard.scan(**leaves, scale=0.3, **options)
    used = [(y, w.to(y)) for y, w in zip((out, state), weights, strict=True) if w is not None]
    torch.autograd.backward([y for y, _ in used], [w for _, w in used])
    return {"out": out, "state": state} | {f"gradient of {name}": x.grad for name, x in leaves.items()}


def check(given, dtype=torch.float32, gates=torch.float32, which=(True, True), **options):
    """Assert that outputs and all gradients are right, for a loss that reads the outputs, the last state, or both."""
    dtypes = {"q": dtype, "k": dtype, "v": dtype, "decay": gates}
    given = {name: x.to(dtypes.get(name, torch.float32)) for name, x in given.items() if x is not None}
    make, state = drawn(7), given.get("initial_state")
    sizes = given["v"].shape, given["q"].shape[:1] + given["v"].shape[1:2] + given["q"].shape[3:] + given["v"].shape[3:]
    weights = [make(*sizes[0]).to(dtype), make(*(sizes[1] if state is None else state.shape))]
    weights = [w if on else None for w, on in zip(weights, which, strict=True)]
    options["delta"] = "beta" in given and options.get("delta", True)
    expected = results({name: x.double() for name, x in given.items()}, weights, backend="chunked", **options)
    there = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with filled_with_nan():
        found = results({name: x.to(DEVICE) for name, x in given.items()}, weights, backend="triton", **there)
    assert (found["out"].dtype, found["state"].dtype) == (dtype, torch.float32)
    compare(found, expected, dtype)


def compare(found, expected, dtype):
    """Assert that all results agree, by the norm of their errors."""
    for name, wanted in expected.items():
        x = found[name]
        if wanted is None:
            assert x is None or not x.any(), f"{name} should be 0"
            continue
        assert x.shape == wanted.shape
        assert x.isfinite().all(), f"{name}: {(~x.isfinite()).sum()} entries are not finite"
        most = FLOATS[dtype] * (OF_DECAYS[dtype] if name == "gradient of decay" else 1)
        error = (x.double().cpu() - wanted).norm() / wanted.norm().clamp(min=1.0)
        assert error <= most, f"{name} errs by {error:.2e}, more than {most:.2e}"


@pytest.mark.parametrize(("kind", "delta"), CASES)
def test_gates(kind, delta):
    """Two chunks, the last one short, two value heads on a key head, and heads inside tokens."""
    given = made(kind, delta, H=2, Dv=32)
    check({name: x if x is None else inside(x) for name, x in given.items()})


def test_decays_that_do_not_lie_side_by_side():
    given = {name: x.float().to(DEVICE) for name, x in made("head", False, H=2, T=20).items() if x is not None}
    apart = torch.stack([given["decay"], torch.zeros_like(given["decay"])], 1)[:, 0]
    assert torch.equal(kernel.scan(**given | {"decay": apart})[0], kernel.scan(**given)[0])


@pytest.mark.parametrize(("kind", "T"), [("channel", 1), ("token", 64), ("token", 129)])
def test_lengths(kind, T):
    check(made(kind, True, T=T))


@pytest.mark.parametrize(("kind", "delta"), [("token", True), ("key channel", False)])
def test_heads(kind, delta):
    """Two value heads on each of two key heads, and fewer columns than channels."""
    check(made(kind, delta, Hk=2, H=4, T=20, D=32))


# Compiled for a GPU, these read shared memory out of bounds with 4 warps.
UNEQUAL = [(32, 64), (64, 32), (64, 128), (128, 64), (128, 256)] if DEVICE == "cuda" else [(32, 64)]


@pytest.mark.parametrize("sizes", UNEQUAL)
@pytest.mark.parametrize("kind", ["token", "channel"])
def test_values_wider_or_narrower_than_keys(kind, sizes):
    given = made(kind, True, T=130, D=sizes[0], Dv=sizes[1])
    check(given | {name: inside(given[name]) for name in ("q", "k", "v")}, torch.bfloat16)


@pytest.mark.parametrize(("kind", "delta"), [("token", False), ("channel", True)])
def test_anchors(kind, delta):
    """Sums of decays begin again every four chunks."""
    check(made(kind, delta, T=290))


@pytest.mark.parametrize(("kind", "delta"), [("token", False), ("channel", True)])
def test_segments(kind, delta):
    """One long sequence is worked on in pieces, the last one short."""
    rows = 1030
    assert cut(((0, 0, rows),), CHUNK, 2, torch.device(DEVICE)).count == 2
    check(made(kind, delta, T=rows))


@pytest.mark.parametrize(("kind", "delta"), [("head", False), ("token", True), ("channel", True)])
def test_packed(kind, delta):
    bounds = torch.tensor([0, 1, 70, 75], dtype=torch.int32)
    check(made(kind, delta, rows=3, T=75), cu_seqlens=bounds)


def test_packed_sequences_are_separate():
    """To the last bit: a sequence does not see where in memory it lies."""
    given = {name: x.float().to(DEVICE) for name, x in made("channel", True, rows=2, T=75).items()}
    call = {"delta": True, "scale": 0.3}
    out, state = kernel.scan(**given, **call, cu_seqlens=torch.tensor([0, 5, 75], device=DEVICE))
    for i, (start, stop) in enumerate([(0, 5), (5, 75)]):
        own = {name: x[:, :, start:stop] for name, x in given.items() if name != "initial_state"}
        alone = kernel.scan(**own, **call, initial_state=given["initial_state"][i : i + 1])
        for x, y in zip(alone, (out[:, :, start:stop], state[i : i + 1]), strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["token", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta", [False, True])
def test_sixteen_bits(kind, dtype, delta):
    given = made(kind, delta, D=32)
    if kind == "channel" and dtype == torch.float16:
        given["decay"] = given["decay"] / 8  # no more than float16 can split into shares: the fast path
    check(given, dtype)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_decays_of_sixteen_bits(kind):
    check(made(kind, True, D=32), torch.bfloat16, gates=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wide_chunks(dtype):
    """Channels that forget everything within a chunk, next to others that forget nothing."""
    given = made("channel", True, T=20, D=32)
    given["decay"] = given["decay"] * torch.linspace(0, 40, 32, dtype=torch.float64)
    check(given, dtype)


EXTREME = [
    *itertools.product(["head", "token"], [0.0, -1e4, -torch.inf], [True]),
    *[
        ("head", -torch.inf, False),
        ("token", -torch.inf, False),
        ("channel", 0.0, False),
        ("channel", -torch.inf, True),
    ],
]


@pytest.mark.parametrize(("kind", "gate", "delta"), EXTREME)
def test_extreme_decays(kind, gate, delta):
    """In every token, or wherever a document might begin."""
    given = made(kind, delta)
    if kind == "head":
        given["decay"].fill_(gate)
    else:
        given["decay"][:, :, [10, 66, 68, 69]] = gate
    check(given)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", [-80.0, -torch.inf])
@pytest.mark.parametrize("kind", ["token", "channel"])
def test_a_reset_in_every_chunk(kind, gate, delta):
    """A text that begins between two resets lies across the border of two chunks."""
    given = made(kind, delta, T=80)
    given["decay"].zero_()[:, :, [10, 74]] = gate
    check(given)


@pytest.mark.parametrize("kind", ["none", "token", "channel"])
def test_extreme_strengths(kind):
    given = made(kind, True, T=20)
    given["beta"][:, :, ::3], given["beta"][:, :, 1::3] = 0, 1
    check(given)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_strengths_without_the_delta_rule(kind):
    check(made(kind, True, T=20), delta=False)


@pytest.mark.parametrize("which", [(True, False), (False, True)])
@pytest.mark.parametrize(("kind", "delta"), [("token", True), ("channel", False)])
def test_losses(kind, delta, which):
    """A loss that reads only the outputs, or only the last state; no initial state."""
    check({**made(kind, delta, T=20), "initial_state": None}, which=which)


@pytest.mark.parametrize(("kind", "delta"), [("head", False), ("channel", True)])
def test_padding(kind, delta):
    """More than a chunk of it, on either side: what lies there is not read."""
    given = made(kind, delta, B=2, T=90)
    mask = torch.zeros(2, 90, dtype=torch.bool)
    mask[0, :20] = mask[1, 70:] = True
    given |= {name: given[name].masked_fill(~mask[:, None, :, None], torch.nan) for name in "qkv"}
    check(given, mask=mask)


@pytest.mark.parametrize("delta", [False, True])
def test_an_expanded_gradient(delta):
    """`out.sum()` hands back one number for all entries."""
    given = {n: x.float().to(DEVICE) for n, x in made("token", delta, H=2, T=20).items() if x is not None}
    grads = []
    for backend in ("chunked", "triton"):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        regard.scan(**leaves, delta=delta, backend=backend)[0].sum().backward()
        grads.append({name: x.grad.double().cpu() for name, x in leaves.items()})
    compare(grads[1], grads[0], torch.float32)


def test_no_gradient_is_asked_for():
    """Gates that learn nothing, and nothing that learns."""
    given = {name: x.float().to(DEVICE) for name, x in made("token", True, T=20).items()}
    wanted = regard.scan(**given, delta=True, backend="chunked")
    given["q"].requires_grad_()
    out, state = regard.scan(**given, delta=True, backend="triton")
    compare(
        {"out": out, "state": state},
        {"out": wanted[0].double().cpu(), "state": wanted[1].double().cpu()},
        torch.float32,
    )
    out.sum().backward()
    assert given["q"].grad is not None
    assert all(x.grad is None for name, x in given.items() if name != "q")


REFUSED = {
    "key channels": ({"q": (48, None), "k": (48, None)}, "D of 16, 32, 64, 128, 256, got 48"),
    "value channels": ({"v": (48, None)}, "Dv of 16, .*got 48"),
    "float64": (dict.fromkeys("qkv", (16, torch.float64)), "bfloat16, float16 or float32, got torch.float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    written, words = REFUSED[case]
    sizes = {name: written.get(name, (16, None)) for name in "qkv"}
    q, k, v = (torch.zeros(1, 1, 4, size, dtype=dtype, device=DEVICE) for size, dtype in sizes.values())
    with pytest.raises(RegardError, match=f"backend 'triton' refuses: .*{words}"):
        regard.scan(q, k, v, backend="triton")


@pytest.mark.parametrize(("D", "dtype"), [(128, torch.float32), (256, torch.bfloat16)])
def test_refuses_narrow_values_of_wide_keys(D, dtype):
    """What the compiler gets wrong, and no more than that."""
    q, v = torch.zeros(1, 1, 4, D, dtype=dtype, device=DEVICE), torch.zeros(1, 1, 4, 64, dtype=dtype, device=DEVICE)
    assert kernel.refuses(q, q, v) is None
    assert "Dv of at least 64" in kernel.refuses(q, q, v[..., :32])
    assert kernel.refuses(q[..., :64], q[..., :64], v[..., :32]) is None


def test_refuses_mixed_dtypes():
    q = torch.zeros(1, 1, 4, 16, device=DEVICE)
    assert "got torch.float32, torch.float32, torch.bfloat16" in kernel.refuses(q, q, q.bfloat16())


def test_refuses_decays_of_64_bits():
    q, decay = torch.zeros(1, 1, 4, 16, device=DEVICE), torch.zeros(1, 1, 4, 16, dtype=torch.float64, device=DEVICE)
    assert "decays in bfloat16, float16 or float32, got torch.float64" in kernel.refuses(q, q, q, decay=decay)


def test_refuses_to_teach_the_decay_of_a_head_in_sixteen_bits():
    q, decay = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16, device=DEVICE), torch.zeros(1, device=DEVICE)
    assert kernel.refuses(q, q, q, decay=decay) is None
    decay.requires_grad_()
    assert (
        kernel.refuses(q, q, q, decay=decay) == "one decay a head adds up over all tokens: its gradient needs float32"
    )
    assert kernel.refuses(*[q.float()] * 3, decay=decay) is None


HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
FORWARD = {
    "one token": {"T": 1},
    "a chunk but one": {"T": 63},
    "a chunk and one": {"T": 65, "initial": False},
    "several chunks": {"T": 700, "dtype": torch.float16},
    "heads inside tokens": {"T": 700, "change": inside},
    "no decay": {"T": 200, "decay": None},
    "extreme decays": {"T": 300, "decay": [0.0, -1e4, -torch.inf, -1e-7]},
    "more segments than multiprocessors": {"T": 130, "B": 40},
    "one long sequence": {"T": 1100, "B": 1, "initial": False},
}


def counted(module, monkeypatch):
    """A list that gets an entry for every sweep of `module`, but for those of rehearsals."""
    called, sweep = [], module.sweep

    def watched(problem, *inputs, **options):
        if problem.device.type != "meta":
            called.append(problem)
        sweep(problem, *inputs, **options)

    monkeypatch.setattr(module, "sweep", watched)
    return called


@pytest.mark.skipif(not HOPPER, reason="the kernel of hopper.py needs a Hopper GPU")
@pytest.mark.parametrize("case", FORWARD)
def test_kernel_for_hopper(case, monkeypatch):
    how = {"B": 2, "dtype": torch.bfloat16, "change": lambda x: x, "initial": True} | FORWARD[case]
    how = {"decay": [-0.001, -0.1, -0.5, -1.0]} | how
    from regard.kernels.states import hopper

    called = counted(hopper, monkeypatch)
    given = made("none", False, B=how["B"], Hk=2, H=4, T=how["T"], D=128, Dv=128)
    if not how["initial"]:
        del given["initial_state"]
    decay = None if how["decay"] is None else torch.tensor(how["decay"])
    check({name: x if x is None else how["change"](x) for name, x in given.items()}, how["dtype"], decay=decay)
    assert len(called) == (6 if case == "one long sequence" else 4), "output, three gradients, states of segments"


DELTA = {
    "one token": ("channel", {"T": 1}, 1),
    "a chunk and one": ("channel", {"T": 65, "initial": False}, 1),
    "several chunks, fewer heads of keys": ("channel", {"T": 700, "Hk": 2}, 1),
    "float16": ("channel", {"T": 200, "dtype": torch.float16}, 1),
    "one long sequence": ("channel", {"T": 1100, "B": 1}, 3),
    "one long sequence, decay by token": ("token", {"T": 1100, "B": 1}, 2),
    "one long sequence, no decay": ("none", {"T": 1100, "B": 1, "initial": False}, 2),
}


@pytest.mark.skipif(not HOPPER, reason="the kernel of hopper_delta.py needs a Hopper GPU")
@pytest.mark.parametrize("case", DELTA)
def test_delta_rule_for_hopper(case, monkeypatch):
    from regard.kernels.states import hopper_delta

    called = counted(hopper_delta, monkeypatch)
    kind, how, count = DELTA[case]
    how = {"B": 2, "Hk": 4, "dtype": torch.bfloat16, "initial": True} | how
    given = made(kind, True, B=how["B"], Hk=how["Hk"], H=4, T=how["T"], D=128, Dv=128)
    if not how["initial"]:
        del given["initial_state"]
    check(given, how["dtype"])
    assert len(called) == count, "states of segments; outputs too where channels decay on their own"


@pytest.mark.skipif(not HOPPER, reason="the kernel of hopper.py needs a Hopper GPU")
def test_what_is_far_but_large_is_not_lost():
    """A segment begins with all that float32 holds of those before; what has faded from it is not read."""
    q, k, v = tokens(B=1, Hk=1, H=2, T=1030, D=128, Dv=128, dtype=torch.float32)
    v[:, :, 524] *= 2.0**120
    q, k, v = (x.bfloat16() for x in (q, k, v))
    given = {"q": q, "k": k, "v": v, "decay": torch.tensor([-0.16, -1.0])}
    _, expected = regard.scan(**{name: x.double() for name, x in given.items()}, backend="chunked")
    _, state = regard.scan(**{name: x.to(DEVICE) for name, x in given.items()}, backend="triton")
    for head in range(2):
        compare({"state": state[:, head]}, {"state": expected[:, head]}, torch.bfloat16)
    assert expected[0, 0].norm() > 5 * expected[0, 1].norm(), "what is far should be seen"
