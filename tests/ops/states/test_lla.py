"""Local Linear Attention [086]: the oracles of its sheet, against the raw weights of the paper."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from regard.core.errors import RegardError
from regard.ops.states.lla import scan
from regard.primitives.conjugate import conjugate
from regard.primitives.regression import Fit, read, weights

BACKENDS = ["dense", "blockwise"]


def made(T, B=2, H=2, D=4, Dv=3, Hk=None, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    heads = {"q": (H, D), "k": (Hk or H, D), "v": (Hk or H, Dv)}
    return [torch.randn(B, h, T, d, generator=g, dtype=torch.float64).to(dtype) for h, d in heads.values()]


def raw_weights(q, k, ridge, scale=None, block=None):
    """`s_ij [B, H, T, T]` as the sheet defines them, one query after the other; `ridge` a number or `[B, H, T]`."""
    B, H, T, D = q.shape
    block, scale = block or D, D**-0.5 if scale is None else scale
    s = torch.zeros(B, H, T, T, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                score = scale * (k[b, h, : i + 1] @ q[b, h, i])
                w = torch.exp(score - score.max())
                z = k[b, h, : i + 1] - q[b, h, i]
                omega, mu = w.sum(), w @ z
                own = ridge if isinstance(ridge, float) else ridge[b, h, i]
                sigma = (z.T * w) @ z + own * omega * torch.eye(D, dtype=q.dtype)
                parts = [slice(a, a + block) for a in range(0, D, block)]
                rho = torch.cat([torch.linalg.solve(sigma[a, a], mu[a]) for a in parts])
                delta = omega - mu @ rho
                s[b, h, i, : i + 1] = w * (1 - z @ rho) / delta
    return s


def near(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"block": 2}, {"block": 1}, {"block": 4}, {"scale": 0.0}, {"jacobi": True}])
@pytest.mark.parametrize("ridge", [0.3, 10.0])
def test_equals_the_raw_form(backend, options, ridge):
    q, k, v = made(13)
    raw = {name: value for name, value in options.items() if name != "jacobi"}
    s = raw_weights(q, k, ridge, **raw)
    near(s.sum(-1), torch.ones_like(s[..., 0]), 1e-12)
    found, _ = scan(q, k, v, ridge=ridge, backend=backend, tolerance=1e-26, **options)
    near(found, s @ v, 1e-12)
    near(found[:, :, 0], v[:, :, 0], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ridge_a_query(backend):
    q, k, v = made(11)
    ridge = torch.rand(2, 11, dtype=torch.float64) + 0.1
    found, _ = scan(q, k, v, ridge=ridge, backend=backend, tolerance=1e-26)
    near(found, raw_weights(q, k, ridge[:, None].expand(2, 2, 11)) @ v, 1e-12)
    near(scan(q, k, v, ridge=ridge[:, None].expand(2, 2, 11), backend=backend, tolerance=1e-26)[0], found, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_ridge_is_softmax_attention(backend):
    q, k, v = made(70)
    near(scan(q, k, v, ridge=1e14, backend=backend)[0], F.scaled_dot_product_attention(q, k, v, is_causal=True), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_values_are_read_exactly(backend):
    """With D + 1 keys or more, and no ridge there: the linear map at the query, wherever that lies."""
    q, k, _ = made(30)
    slope, constant = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    ridge = torch.zeros(2, 30, dtype=torch.float64)
    ridge[:, :5] = 1.0
    found, _ = scan(q, k, k @ slope + constant, ridge=ridge, backend=backend, tolerance=1e-28, iterations=100)
    near(found[:, :, 5:], (q @ slope + constant)[:, :, 5:], 1e-8)


def test_flat_weights_are_least_squares_with_intercept():
    q, k, v = made(25)
    ridge = torch.ones(2, 25, dtype=torch.float64)
    ridge[:, -1] = 0
    found, _ = scan(q, k, v, ridge=ridge, scale=0.0, backend="dense")
    design = torch.cat([k, torch.ones_like(k[..., :1])], -1)
    solution = torch.linalg.lstsq(design, v).solution
    wanted = torch.cat([q, torch.ones_like(q[..., :1])], -1)[:, :, -1:] @ solution
    near(found[:, :, -1:], wanted, 1e-9)


def test_given_slopes_are_parallax():
    parallax = pytest.importorskip("fla.ops.parallax.naive")
    q, k, v = made(19, Dv=4, dtype=torch.float32)
    r = torch.randn_like(q)
    fit = Fit(scale=0.5, block=4)
    p = weights(q, k, None, 0, fit)
    # There the slopes come with the other sign.
    found = read(p, k, v, p @ k, p @ k - q, r, fit)
    turned = [x.transpose(1, 2) for x in (q, r, k, v)]
    near(found, parallax.naive_parallax(*turned, scale=0.5).transpose(1, 2), 1e-4)


@pytest.mark.parametrize("jacobi", [False, True])
@pytest.mark.parametrize("block", [None, 8])
def test_blocks_equal_the_dense_form(jacobi, block):
    """float32, T of 1,024, within 1e-3; gradients too."""
    grads, outs = [], []
    for backend in BACKENDS:
        call = [x.requires_grad_() for x in made(1024, B=1, H=1, D=16, Dv=16, dtype=torch.float32)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, _ = scan(*call, ridge=1.0, backend=backend, jacobi=jacobi, block=block)
        out.square().sum().backward()
        outs.append(out.detach())
        grads.append([x.grad for x in call])
    assert (outs[0] - outs[1]).abs().max() < 1e-3
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-3 * a.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"block": 1}, {"jacobi": True}])
def test_gradients(backend, options):
    q, k, v = (x.requires_grad_() for x in made(6, B=1, H=2, Hk=1, D=2, Dv=2))
    ridge = (torch.rand(1, 2, 6, dtype=torch.float64) + 0.5).requires_grad_()

    def run(q, k, v, ridge):
        return scan(q, k, v, ridge=ridge, backend=backend, tolerance=1e-30, **options)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(run, (q, k, v, ridge))


def test_gradients_cross_blocks_of_queries():
    grads = []
    for backend in BACKENDS:
        call = [x.requires_grad_() for x in made(150, Hk=1)]
        out, _ = scan(*call, ridge=0.5, backend=backend, tolerance=1e-26)
        out.sin().sum().backward()
        grads.append([x.grad for x in call])
    for a, b in zip(*grads, strict=True):
        near(a, b, 1e-9)


@pytest.mark.parametrize("splits", [[1] * 12, [5, 1, 1, 5], [3, 9]])
def test_decoding_from_a_cache_is_the_full_forward(splits):
    call = made(12, H=4, Hk=2)
    wanted, _ = scan(*call, backend="dense")
    state, parts = None, []
    for part in zip(*(x.split(splits, 2) for x in call), strict=True):
        out, state = scan(*part, initial_state=state, tolerance=1e-26)
        parts.append(out)
    near(torch.cat(parts, 2), wanted, 1e-11)
    assert state.keys.shape == (2, 2, 12, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_packing_change_nothing(backend):
    call, more = made(10), made(3, seed=3)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :4], mask[1, 8:] = False, False
    options = {"backend": backend, "tolerance": 1e-26}
    out, state = scan(*call, mask=mask, **options)
    later, _ = scan(*more, initial_state=state, **options)
    assert not out.transpose(1, 2)[~mask].any()
    for row in range(2):
        real = [torch.cat([x[row : row + 1][:, :, mask[row]], y[row : row + 1]], 2) for x, y in zip(call, more)]  # noqa: B905
        wanted, _ = scan(*real, backend="dense")
        near(torch.cat([out[row][:, mask[row]], later[row]], 1), wanted[0], 1e-11)
    call = made(12, B=1)
    out, state = scan(*call, cu_seqlens=torch.tensor([0, 5, 12]), **options)
    near(out[:, :, :5], scan(*(x[:, :, :5] for x in call), **options)[0], 1e-11)
    near(out[:, :, 5:], scan(*(x[:, :, 5:] for x in call), **options)[0], 1e-11)
    assert state.keys.shape[0] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(dtype, backend):
    call = made(20, dtype=dtype)
    found, _ = scan(*call, backend=backend)
    wanted, _ = scan(*(x.float() for x in call), backend=backend)
    assert found.dtype == dtype
    assert torch.equal(found, wanted.to(dtype))


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_channels():
    g = torch.Generator().manual_seed(0)
    half = torch.randn(5, 6, 6, generator=g, dtype=torch.float64)
    matrix = half @ half.transpose(1, 2) + torch.eye(6, dtype=torch.float64)
    right = torch.randn(5, 6, generator=g, dtype=torch.float64)
    wanted = torch.linalg.solve(matrix, right)

    def apply(x):
        return (matrix @ x[..., None])[..., 0]

    for diagonal in (None, matrix.diagonal(dim1=1, dim2=2)):
        found, done = conjugate(apply, right, diagonal=diagonal, iterations=12, tolerance=1e-24)
        near(found, wanted, 1e-9)
        assert done.all()
        assert not conjugate(apply, right, diagonal=diagonal, iterations=2, tolerance=1e-24)[1].any()
    zero, done = conjugate(apply, torch.zeros_like(right))
    assert done.all()
    assert not zero.any()


def test_too_few_iterations_warn_with_their_number():
    with pytest.warns(UserWarning, match=r"in 1 iterations for \d+ of 80 queries"):
        scan(*made(20), ridge=0.01, iterations=1, backend="blockwise")


def test_memory_is_linear(monkeypatch):
    """The largest tensor that is made has as many elements as a block of queries has weights, not as T x T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.seen = max(self.seen, x.numel())
            return out

    largest = []
    for T in (512, 1024):
        with Largest() as mode:
            call = [x.requires_grad_() for x in made(T, B=1, H=1, dtype=torch.float32)]
            scan(*call)[0].sum().backward()
        largest.append(mode.seen)
    assert largest == [64 * 512, 64 * 1024]


def stream(seed, segments=4, length=64, D=16):
    """Keys, their values under a map that changes with every segment, and queries elsewhere in the segment."""
    g = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(segments, 1, D, generator=g) / D**0.5 * 2
    maps, noise = torch.randn(segments, D, D, generator=g) / D**0.5, 0.05
    keys = centres + torch.randn(segments, length, D, generator=g)
    queries = centres + torch.randn(segments, length, D, generator=g)
    values = keys @ maps + noise * torch.randn(segments, length, D, generator=g)
    return [x.reshape(1, 1, segments * length, D) for x in (queries, keys, values, queries @ maps)]


@pytest.mark.parametrize("seed", range(5))
def test_piecewise_linear_streams_favour_it(seed):
    """Less error than softmax attention and than one ridge regression over all keys, each at its best setting."""
    queries, keys, values, wanted = stream(seed)

    def error(**options):
        return float((scan(queries, keys, values, backend="dense", **options)[0] - wanted).square().mean())

    scales = (0.25, 0.5, 1.0)
    local = min(error(scale=c, ridge=r) for c in scales for r in (0.01, 0.1, 1.0))
    softmax = min(error(scale=c, ridge=1e8) for c in scales)
    ridge = min(error(scale=0.0, ridge=r) for r in (0.01, 0.1, 1.0))
    assert local < 0.9 * min(softmax, ridge)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ridge": -1.0}, "at least 0, got -1.0"),
        ({"ridge": float("nan")}, "got nan"),
        ({"ridge": torch.tensor([[1.0, -2.0] * 3] * 2)}, "at least 0, got -2.0"),
        ({"ridge": torch.ones(3)}, r"\[2, 6\] or \[2, 2, 6\], got \[3\]"),
        ({"ridge": 0.0}, "query 0 .*1 keys span 0 of 4"),
        ({"block": 3}, "divide the head dimension 4, got 3"),
        ({"iterations": 0}, "at least 1"),
        ({"k": torch.rand(2, 2, 5, 4)}, "disagree|must be"),
        ({"k": torch.rand(2, 3, 6, 4), "v": torch.rand(2, 3, 6, 3)}, "3"),
        ({"mask": torch.ones(2, 6)}, r"bool \[B, T\]"),
        ({"backend": "block"}, "blockwise"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "one batch row"),
        ({"initial_state": scan(*made(3, D=8, dtype=torch.float32))[1]}, r"holds keys \[2, 2, 3, 8\]"),
    ],
)
def test_errors(change, match):
    call = dict(zip(("q", "k", "v"), made(6, dtype=torch.float32), strict=True)) | change
    with pytest.raises(RegardError, match=match):
        scan(**call)
