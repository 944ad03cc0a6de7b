"""What CI cannot run: the same definitions on a CUDA device (`make test-cuda`)."""

import pytest
import torch

import regard
from contracts.decoding import GENERATE, at_once, forced, prompts
from contracts.subjects import MECHANISMS, example, telling
from families import tiny
from regard import Pattern
from regard.adapters.families import open_decoder
from regard.adapters.memory import live_bytes
from regard.catalog import find

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _reading():
    with telling():
        yield


PATTERNS = {
    "full": None,
    "causal": Pattern.causal(),
    "local": Pattern.sink(4) | Pattern.window(50),
    "heads": Pattern.stack_heads([Pattern.causal(), Pattern.sink(3) | Pattern.window(33)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "S"), [(257, 257), (1, 301), (37, 300), (64, 64)])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("padded", [False, True])
def test_fused_attention_and_all_gradients(dtype, T, S, pattern, padded):
    drawn = torch.Generator().manual_seed(0)
    shapes = [(2, 4, T, 64), (2, 2, S, 64), (2, 2, S, 64), (2, 4, T, 64), (2, 4, T)]
    exact = [torch.randn(shape, generator=drawn, dtype=torch.float64) for shape in shapes]
    exact = [x.to(dtype).double() for x in exact[:4]] + exact[4:]
    places = {}
    if padded:
        arrivals = torch.arange(S)[None] - torch.tensor([[5], [0]])
        places = {"k_positions": arrivals, "q_positions": arrivals[:, S - T :]}
    rule = {"pattern": PATTERNS[pattern], "causal": PATTERNS[pattern] is not None}

    def run(tensors, where, attention):
        q, k, v = (x.detach().to(where).requires_grad_() for x in tensors[:3])
        out, lse = attention(q, k, v)
        real = places["q_positions"].to(q.device)[:, None] >= 0 if padded else torch.ones_like(lse, dtype=torch.bool)
        seen = (lse > -torch.inf) & real
        loss = (out.double() * tensors[3].to(q.device)).sum()
        loss = loss + (lse.double().masked_fill(~seen, 0) * tensors[4].to(q.device)).sum()
        return [out, lse.masked_fill(~seen, 0), *torch.autograd.grad(loss, (q, k, v))]

    def attend(backend):
        here = lambda q: {name: place.to(q.device) for name, place in places.items()}  # noqa: E731
        return lambda q, k, v: regard.attend(q, k, v, **rule, **here(q), backend=backend)

    def plain(q, k, v):
        # Low-precision code as anyone would write it: what it errs is what a kernel may err.
        rows = places.get("q_positions", torch.arange(S - T, S)[None])
        keys = places.get("k_positions", torch.arange(S)[None])
        known = PATTERNS[pattern]
        seen = known.allow(rows, keys, 2) if known else ((keys >= 0)[:, None] & (rows >= 0)[..., None])[:, None]
        seen = seen.to(q.device)
        seen = seen.repeat_interleave(2, 1) if seen.shape[1] == 2 else seen
        scores = (q @ k.repeat_interleave(2, 1).mT) * 64**-0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        empty = ~seen.any(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        return weights @ v.repeat_interleave(2, 1), scores.masked_fill(empty, 0).logsumexp(-1)

    low = [x.to(dtype).cuda() for x in exact[:3]] + exact[3:]
    truth = run(exact, "cpu", attend("reference"))
    usual = run(low, "cuda", plain)
    fused = run(low, "cuda", attend("sdpa"))
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), truth, usual, fused, strict=True):
        floor = torch.finfo(dtype).eps * float(a.abs().max())
        allowed = 2 * float((b.double().cpu() - a).abs().max()) + 16 * floor
        error = float((c.double().cpu() - a).abs().max())
        assert error <= allowed, name


@pytest.mark.parametrize("stem", MECHANISMS)
def test_mechanisms_decode_as_on_a_cpu(stem):
    model = tiny("llama")
    recipe = example(stem, open_decoder(model))
    ids, mask = prompts(length=36)
    with regard.attach(model, recipe):
        expected = forced(model, ids, mask, [9, 20, 30])
    model.cuda()
    ids, mask = ids.cuda(), mask.cuda()
    with regard.attach(model, recipe):
        found = forced(model, ids, mask, [9, 20, 30])
        whole = at_once(model, ids, mask)
        again = [model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for _ in range(2)]
    real = mask.bool()
    # A code may flip where the CPU and the GPU round differently; most of the rows must agree.
    off = (found.cpu()[real.cpu()] - expected[real.cpu()]).abs().amax(-1)
    assert float((off > 1e-3).float().mean()) < (0.5 if stem == "saw_int4" else 0.01)
    assert torch.isfinite(whole[real]).all()
    assert torch.equal(*again)


@pytest.mark.parametrize("stem", MECHANISMS)
def test_a_bfloat16_model_runs_and_its_bytes_are_live(stem):
    model = tiny("llama").bfloat16().cuda()
    ids, mask = (x.cuda() for x in prompts(length=36))
    with regard.attach(model, example(stem, open_decoder(model))) as handle, torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        assert out.logits[mask.bool()].isfinite().all()
        held = live_bytes(out.past_key_values)
        # Where only weights are edited, the cache is the model's own.
        assert held > 0
        assert handle.nbytes == (0 if find(stem).site == "parameters" else held)


def test_every_way_of_generating_runs():
    model = tiny("llama").cuda()
    ids, mask = (x.cuda() for x in prompts(1, padding=0))
    for stem in MECHANISMS:
        with regard.attach(model, example(stem, open_decoder(model))):
            for way in GENERATE.values():
                assert model.generate(ids, attention_mask=mask, max_new_tokens=5, **way).shape == (1, 26)
