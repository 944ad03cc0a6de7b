import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.core.errors import RegardError
from regard.ops.routing import spread
from regard.ops.sparsity import sla

ROUGH = {"critical": 0.3, "negligible": 0.3, "rows": 8, "keys": 4}


def made(B=1, H=2, Hk=1, N=37, S=43, D=6, Dv=5, seed=0, dtype=torch.float64):
    drawn = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=drawn, dtype=dtype)  # noqa: E731
    q, k, v = normal(B, H, N, D), normal(B, Hk, S, D), normal(B, Hk, S, Dv)
    return q, k, v, normal(Dv, Dv), normal(Dv)


def by_loops(q, k, v, weight, bias, routing, size, semantics, features):
    """Token by token, as the sheet has it."""
    B, H, N, D = q.shape
    S, group = k.shape[2], H // k.shape[1]
    phi = sla.FEATURES[features]
    tables = [spread(routing.table(between=which), size, (N, S)) for which in (False, True)]
    out = torch.zeros(B, H, N, v.shape[3], dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h // group], v[b, h // group]
            for i in range(N):
                read, between = (table[b, h, i] for table in tables)
                exact = torch.softmax(q[b, h, i] @ keys[read].T * D**-0.5, -1) @ values[read]
                counted = {"paper": between, "rest": ~read, "all": read | ~read}[semantics]
                share = phi(keys[counted]) @ phi(q[b, h, i])
                below = share.sum() + (sla.FLOOR if semantics == "all" else 0)
                # Nothing counts, or relu left nothing of the query.
                smooth = share @ values[counted] / below if below > 0 else torch.zeros_like(bias)
                out[b, h, i] = exact + smooth @ weight.T + bias
    return out


@pytest.mark.parametrize("features", sla.FEATURES)
@pytest.mark.parametrize("semantics", sla.CARD.options["semantics"].choices)
@pytest.mark.parametrize("backend", ["dense", "gather"])
def test_definition(semantics, features, backend):
    given = made(B=2)
    routing = sla.route(*given[:2], critical=0.3, negligible=0.3 if semantics == "paper" else 0.0, size=(8, 4))
    expected = by_loops(*given, routing, (8, 4), semantics, features)
    found = sla.attend(*given, **ROUGH, semantics=semantics, features=features, backend=backend)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_routing():
    q, k, *_ = made(N=10, S=16)
    routing = sla.route(q, k, critical=0.25, negligible=0.5, size=(4, 4))
    assert routing.chosen.shape == (1, 2, 3, 1)
    assert routing.dropped.shape == (1, 2, 3, 2)
    assert (routing.table().sum(-1) == 1).all()
    assert (routing.table(between=True).sum(-1) == 1).all()
    # The last block of queries has two tokens.
    scores = q[0, 0, 8:].mean(0) @ k[0, 0].unflatten(0, (4, 4)).mean(1).T
    assert routing.chosen[0, 0, 2].tolist() == [scores.argmax()]
    assert set(routing.dropped[0, 0, 2].tolist()) == set(scores.argsort()[:2].tolist())


def test_blocks_of_one_token_route_tokens():
    q, k, *_ = made(H=1, N=5, S=8)
    routing = sla.route(q, k, critical=0.25, negligible=0.0, size=(1, 1))
    assert routing.chosen.equal((q @ k.mT).topk(2).indices.sort().values)


def test_block_lists_show_critical_blocks():
    q, k, *_ = made(N=130, S=140)
    routing = sla.route(q, k, critical=0.5, negligible=0.0, size=(64, 32))
    listed = routing.listed((64, 32), (130, 140))
    assert listed.to_dense().equal(spread(routing.table(), (64, 32), (130, 140)))
    assert listed.full.sum() < listed.count.sum()


def test_all_critical_is_full_attention():
    q, k, v, weight, bias = made(H=1)
    found = sla.attend(q, k, v, weight, bias, critical=1.0, negligible=0.0, rows=8, keys=4)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    # Nothing is left for the linear part, whose projection still adds its bias.
    torch.testing.assert_close(found, full + bias, atol=1e-12, rtol=1e-12)


def test_little_critical_is_linear_attention():
    q, k, v, *_ = made(H=1)
    call = {"size": (8, 4), "features": "softmax"}
    everything = sla.linear(q, k, v, None, torch.eye(5).double(), semantics="all", **call)
    a, b = q.softmax(-1), k.softmax(-1)
    expected = a @ (b.mT @ v) / ((a @ b.mT).sum(-1, keepdim=True) + sla.FLOOR)
    torch.testing.assert_close(everything, expected, atol=1e-12, rtol=1e-12)


def test_chosen_blocks_are_the_total_less_the_others():
    q, k, v, *_ = made(H=1, N=16, S=40)
    routing = sla.route(q, k, critical=0.3, negligible=0.3, size=(8, 4))
    a, b = q.softmax(-1), k.softmax(-1)
    share = a @ b.mT
    left_out = spread(~routing.table(between=True), (8, 4), (16, 40))
    less = share.masked_fill(~left_out, 0)
    expected = (share @ v - less @ v) / (share.sum(-1, keepdim=True) - less.sum(-1, keepdim=True))
    found = sla.linear(q, k, v, routing, torch.eye(5).double(), size=(8, 4), semantics="paper", features="softmax")
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("semantics", sla.CARD.options["semantics"].choices)
def test_gradients(semantics):
    given = [x.requires_grad_() for x in made(N=9, S=13, D=4, Dv=3)]
    assert torch.autograd.gradcheck(lambda *x: sla.attend(*x, **ROUGH, semantics=semantics), given)


def test_a_zero_projection_learns():
    q, k, v, weight, bias = made()
    weight = torch.zeros_like(weight, requires_grad=True)
    sla.attend(q, k, v, weight, bias, **ROUGH).square().sum().backward()
    assert weight.grad.abs().sum() > 0


def clustered(N=4096, D=32):
    """Tokens in runs of one direction each, so that few blocks carry most of the mass."""
    drawn = torch.Generator().manual_seed(0)
    centres = torch.randn(N // 256, D, generator=drawn) * 2
    at = torch.arange(N) // 256
    noise = lambda: torch.randn(1, 1, N, D, generator=drawn)  # noqa: E731
    return centres[at] + noise(), centres[at] + noise(), noise() + torch.randn(N // 256, D, generator=drawn)[at]


def test_linear_attention_mends_what_sparse_attention_leaves_out():
    """At an equal share of critical blocks, once W is fitted by least squares."""
    q, k, v = clustered(2048)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    routing = sla.route(q, k, critical=0.05, negligible=0.0, size=(64, 64))
    alone = sla.sparse(q, k, v, routing, size=(64, 64), scale=32**-0.5, backend="auto")
    smooth = sla.linear(q, k, v, routing, torch.eye(32), size=(64, 64), semantics="rest", features="softmax")
    fitted = torch.linalg.lstsq(smooth[0, 0], (full - alone)[0, 0]).solution
    before, after = ((full - x).norm() / full.norm() for x in (alone, alone + smooth @ fitted))
    assert after < 0.95 * before


def test_work():
    """Products at a share of 5 % take at most 8 % of those of full attention."""
    q, k, v = (x.expand(1, 1, -1, -1) for x in clustered())
    weight = torch.zeros(32, 32)
    with FlopCounterMode(display=False) as counted:
        sla.attend(q, k, v, weight, critical=0.05, semantics="all", backend="gather")
    assert counted.get_total_flops() <= 0.08 * 4 * 4096**2 * 32


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"critical": 0.05}, "critical=0.05 of 11 key blocks is none"),
        ({"critical": 0.6, "negligible": 0.6}, "0.6 \\+ 0.6 > 1"),
        ({"semantics": "papers"}, "semantics"),
        ({"features": "gelu"}, "features"),
        ({"backend": "flash"}, "backend"),
        ({"rows": 0}, "at least one token"),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(RegardError, match=message):
        sla.attend(*made(), **{**ROUGH, **changed})


def test_bad_shapes():
    q, k, v, weight, bias = made()
    with pytest.raises(RegardError, match="weight and bias must be"):
        sla.attend(q, k, v, weight[:3], bias, **ROUGH)
    with pytest.raises(RegardError, match="disagree"):
        sla.attend(q, k, v[:, :, 1:], weight, bias, **ROUGH)
