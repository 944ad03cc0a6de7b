"""VAR [118]: the oracles of its sheet, against the paper's own edit of a built map."""

import pytest
import torch

import regard
from contracts.decoding import at_once, forced, prompts
from contracts.subjects import token_map
from families import tiny
from regard.core.placement import Where
from regard.core.token_map import Kind, Span, TokenMap
from regard.ops.probabilities import var
from steered import drawn, maps, scores, softmax

WIDTH = 1024
WHERE = Where(2, 4, 4, 2, 8, (0, 1), WIDTH)
N, PROMPT, DIMS = 24, 18, (5, 11)
MAP = TokenMap.of_text(torch.ones(2, PROMPT), (Span(0, 2, 9), Span(1, 4, 12)))
# The first token, a text token and one image token of each row; the second row has no visual sink.
SINKS = [[0, 4, 12], [0, 1]]
OPTIONS = {"keep": 0.6, "tau": 20.0, "rho": 0.5, "least": 0.2, "dimensions": "5,11"}


def stream(width=WIDTH, scale=1.0):
    """`[2, N, d]` with massive activations in the dimensions of `DIMS` at `SINKS`."""
    x = torch.randn(2, N, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, sinks in enumerate(SINKS):
        for n, at in enumerate(sinks):
            x[row, at, DIMS[n % 2]] = (-1) ** n * 200.0
    return scale * x


def run(cuts=(), where=WHERE, x=None, padding=None, tokens=MAP, **more):
    q, k = drawn()
    options = OPTIONS | more
    edits = var.reweigh(where, **options), var.watch(where, **options)
    call = {"prompt": PROMPT, "tokens": tokens, "padding": padding, "stream": stream() if x is None else x}
    return maps(q, k, cuts, reweigh=edits[:1], watch=edits[1:], **call)


def loop(A, p=0.6, rho=0.5, least=0.2, heads=range(4)):
    """The paper: one head, row and key at a time."""
    found, moved = A.clone(), 0
    for b, (start, stop) in enumerate(((2, 9), (4, 12))):
        image, sinks = list(range(start, stop)), SINKS[b]
        visual = [j for j in sinks if j in image]
        for h in heads:
            for i in range(stop, N) if visual else ():
                a = A[b, h, i]
                seen, at_sinks = sum(float(a[j]) for j in image), sum(float(a[j]) for j in visual)
                rest = [j for j in image if j not in sinks]
                if seen < least or at_sinks / seen > rho:
                    continue
                moved += 1
                budget = (1 - p) * sum(float(a[j]) for j in sinks)
                for j in sinks:
                    found[b, h, i, j] = p * a[j]
                for j in rest:
                    found[b, h, i, j] = a[j] + budget * a[j] / sum(float(a[t]) for t in rest)
    return found, moved


@pytest.mark.parametrize("cuts", [(), (5, 13, 18, 20), (18, *range(19, N))])
@pytest.mark.parametrize("more", [{}, {"rho": 1.0, "least": 0.0}, {"rho": 0.1, "least": 0.3}], ids=str)
def test_a_forward_is_the_papers_edit(cuts, more):
    plain = softmax(scores(*drawn()))
    want, moved = loop(plain, **more)
    assert moved
    found = run(cuts, **more)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    # Keys of one kind keep their ratio.
    for one, other in ((2, 3), (14, 15)):
        torch.testing.assert_close(found[0, :, 20, one] / found[0, :, 20, other],
                                   plain[0, :, 20, one] / plain[0, :, 20, other])  # fmt: skip


def test_mass_of_other_image_tokens_rises_by_what_sinks_gave():
    plain, found = softmax(scores(*drawn())), run(rho=1.0, least=0.0)
    rest = [j for j in range(2, 9) if j != 4]
    rise = (found - plain)[0, :, 9:][..., rest].sum(-1)
    torch.testing.assert_close(rise, 0.4 * plain[0, :, 9:][..., SINKS[0]].sum(-1))


def test_keep_1_and_heads_and_rows_that_are_not_chosen_change_nothing():
    assert var.reweigh(WHERE, **OPTIONS | {"keep": 1.0}) is None
    assert var.watch(WHERE, **OPTIONS | {"keep": 1.0}) is None
    plain = softmax(scores(*drawn()))
    for nobody in ({"rho": 0.0}, {"least": 1.0}, {"tau": 1e5}):
        torch.testing.assert_close(run(**nobody), plain, atol=1e-12, rtol=1e-9)
    one = run(where=Where(2, 4, 4, 2, 8, (1,), WIDTH), rho=1.0)
    torch.testing.assert_close(one, loop(plain, rho=1.0, heads=(2, 3))[0], atol=1e-12, rtol=1e-9)


def test_the_streams_scale_changes_nothing():
    torch.testing.assert_close(run(x=stream(scale=100.0)), run(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("cuts", [(), (1, 7)])
def test_without_dimensions_the_first_token_tells_them(cuts):
    """That is 5: the planted image token is massive in 11, and a sink once it is massive in 5 too."""
    plain, x = softmax(scores(*drawn())), stream()
    torch.testing.assert_close(run(cuts, dimensions=None, rho=1.0, least=0.0), plain, atol=1e-12, rtol=1e-9)
    x[0, 4, DIMS[0]] = 300.0
    moved = run(cuts, x=x, dimensions=None, rho=1.0, least=0.0)
    torch.testing.assert_close(moved[0, :, 20, SINKS[0]], 0.6 * plain[0, :, 20, SINKS[0]])


def test_left_padding_moves_the_image_and_the_first_token():
    padding = torch.tensor([6, 0])
    q, k = drawn()
    x = stream()
    kinds = torch.full((2, PROMPT), Kind.QUERY, dtype=torch.int8)
    kinds[0, :6], kinds[0, 6], kinds[0, 8:12] = Kind.PADDING, Kind.FIRST, Kind.VISUAL
    kinds[1] = MAP.kinds[1]
    x[0, 6, 5] = x[0, 9, 5] = 200.0
    both = run((7, 10), x=x, padding=padding, tokens=TokenMap(kinds), dimensions=None, rho=1.0, least=0.0)
    plain = softmax(scores(q, k, padding=padding))
    torch.testing.assert_close(both[0, :, 12:, 6], 0.6 * plain[0, :, 12:, 6])
    torch.testing.assert_close(both[0, :, 12:, 9], 0.6 * plain[0, :, 12:, 9])
    torch.testing.assert_close(both[0, :, :12], plain[0, :, :12])
    torch.testing.assert_close(both[0].sum(-1)[:, 6:], torch.ones(4, N - 6, dtype=q.dtype))


def test_a_row_without_other_image_mass_is_left_alone():
    masses = torch.tensor([0.5, 0.1, 0.4, 0.0]).view(4, 1, 1, 1)
    assert torch.equal(var.gains(masses, keep=0.6, rho=1.0, least=0.0), torch.ones(4, 1, 1, 1))
    masses = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64).view(4, 1, 1, 1)
    found = var.gains(masses, keep=0.6, rho=0.5, least=0.2)
    torch.testing.assert_close((found * masses).sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 0.6, 0.6, 1.4], dtype=torch.float64))


@pytest.mark.parametrize("under", ["saw_int4", "duo"])
def test_it_runs_on_codes_and_on_heads_that_hold_different_keys(under):
    model = tiny("llama").double()
    ids, mask = prompts(length=20, padding=4)
    gates = torch.tensor([[0.9, 0.1], [0.5, 0.6], [0.0, 1.0]])
    other = {
        "saw_int4": regard.place("saw_int4"),
        "duo": regard.place("duo", gates=gates, sparsity=0.5, sink=2, recent=5),
    }[under]
    steer = regard.place("var", tau=1.6, rho=1.0, least=0.0)
    tokens, found = token_map(2, torch.tensor([4, 0])), {}
    for name, placed in (("alone", [other]), ("both", [other, steer])):
        with regard.attach(model, placed) as handle, handle.reading(tokens), handle.prompting(15):
            found[name] = forced(model, ids, mask, [6, 15, 16, 18])
            torch.testing.assert_close(at_once(model, ids, mask)[mask.bool()], found[name][mask.bool()])
    assert not torch.allclose(found["alone"], found["both"], atol=1e-3)


def test_a_crop_into_the_prompt_finds_the_same_again():
    model = tiny("llama")
    ids, _ = prompts(padding=0)
    handle = regard.attach(model, [regard.place("var", tau=1.6, rho=1.0, least=0.0)])
    with handle, handle.reading(token_map(2)), handle.prompting(15), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        once = model(input_ids=ids[:, -3:], past_key_values=cache).logits
        cache.crop(-19)
        model(input_ids=ids[:, 5:], past_key_values=cache)
        torch.testing.assert_close(model(input_ids=ids[:, -3:], past_key_values=cache).logits, once)


def test_dimensions_and_maps_that_cannot_be_are_named():
    model, (ids, mask) = tiny("llama"), prompts(padding=0)
    with pytest.raises(regard.RegardError, match="'var' needs dimensions such as '1415,2533', got 'BOS'"):
        regard.attach(model, [regard.place("var", dimensions="BOS")])
    with pytest.raises(regard.RegardError, match=r"dimension 32, .* 0 to 31"):
        regard.attach(model, [regard.place("var", dimensions="3,32")])
    known = regard.attach(model, [regard.place("var", dimensions="3,31")])
    with known, pytest.raises(regard.RegardError, match="'var' needs to know what the tokens are"):
        at_once(model, ids, mask)
