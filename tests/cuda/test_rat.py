"""RAT on a CUDA device: against float64 on a CPU, without waiting for the device, without a mask or repeated keys."""

import pytest
import torch

from regard.layers.states.rat import Mixer
from regard.ops.states.rat import scan
from regard.primitives import sdpa

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def made(T, B=2, G=2, H=4, D=64):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, G, T, D, generator=g) for _ in range(2))
    return q, k, torch.randn(B, H, T, D, generator=g), torch.rand(B, H, T, D, generator=g)


def results(call, weight, **options):
    call = [x.detach().requires_grad_() for x in call]
    out, _ = scan(*call, check=False, **options)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in call)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("T", "chunk"), [(301, 16), (64, 64), (130, 1), (256, 16)])
def test_outputs_and_gradients(dtype, T, chunk):
    call = [x.to(dtype) for x in made(T)]
    weight = torch.randn_like(call[2])
    wanted = results([x.double() for x in call], weight.double(), chunk=chunk)
    found = results([x.cuda() for x in call], weight.cuda(), chunk=chunk)
    for a, b in zip(found, wanted, strict=True):
        assert (a.cpu().double() - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm() + 1e-5 * b.norm()


def test_it_does_not_wait_and_builds_no_mask(monkeypatch):
    seen, kernel = [], sdpa._forward

    def spy(q, k, v, added, square, *rest):
        seen.append((q.shape, k.shape, added, square))
        return kernel(q, k, v, added, square, *rest)

    monkeypatch.setattr(sdpa, "_forward", spy)
    call = [x.to("cuda", torch.bfloat16) for x in made(320)]
    weight = torch.randn_like(call[2])
    results(call, weight, chunk=16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(call, weight, chunk=16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [((8, 16, 19, 64), (8, 1, 19, 64), None, True)] * 2


def test_decoding_does_not_wait_either():
    call = [x.cuda() for x in made(70)]
    with torch.no_grad():
        wanted, _ = scan(*call, chunk=16)
        out, state = scan(*(x[:, :, :50] for x in call), chunk=16, check=False)
        parts = [out]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in range(50, 70):
                out, state = scan(*(x[:, :, t : t + 1] for x in call), chunk=16, initial_state=state, check=False)
                parts.append(out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(torch.cat(parts, 2), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("T", "chunk"), [(301, 16), (64, 64), (5, 16)])
def test_a_layer_and_all_its_gradients(T, chunk):
    """Through the layer's own kernels, which neither wait nor leave it to the plain path."""
    torch.manual_seed(0)
    mixer = Mixer(256, 4, chunk=chunk).bfloat16()
    x, weight = (torch.randn(2, T, 256).bfloat16() for _ in range(2))

    def run(mixer, x, weight):
        mixer.zero_grad()
        x = x.detach().requires_grad_()
        y = mixer(x)
        y.backward(weight)
        return [y.detach(), x.grad, *(p.grad for p in mixer.parameters())]

    wanted = [x.clone() for x in run(mixer.double(), x.double(), weight.double())]
    mixer = mixer.to("cuda", torch.bfloat16)
    assert mixer._refuses(x.cuda()) is None
    x, weight = x.cuda(), weight.cuda()
    run(mixer, x, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(mixer, x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, wanted, strict=True):
        assert (a.cpu().double() - b).norm() <= 8 * torch.finfo(torch.bfloat16).eps * b.norm()
