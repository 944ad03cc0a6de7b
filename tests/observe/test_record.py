"""What a record holds, against the weights of eager attention and against hidden states."""

import pytest
import torch

from contracts.snapshot import snapshot
from families import FAMILIES, VOCABULARY, tiny
from regard import observe
from regard.core.errors import RegardError
from regard.core.token_map import Span, TokenMap
from regard.observe import reader

T, PADDING = 41, 6


def prompts(T=T):
    ids = torch.randint(2, VOCABULARY - 3, (2, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def weights_of(family, inputs):
    """`[L, B, H, T, T]` as transformers' eager attention returns them, without padded rows."""
    model = tiny(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(**inputs, output_attentions=True, use_cache=False).attentions
    return torch.stack(layers) * inputs["attention_mask"][:, None, :, None]


def tiled(weights, record, inputs):
    """Maps from weights, a tile at a time."""
    real = inputs["attention_mask"]
    rows, keys = record.row_edges.tolist(), record.key_edges.tolist()
    maps = torch.zeros(*weights.shape[:3], len(rows) - 1, len(keys) - 1)
    for r in range(len(rows) - 1):
        inside = slice(rows[r], rows[r + 1])
        count = real[:, inside].sum(1).clamp(min=1)[:, None]
        for c in range(len(keys) - 1):
            maps[..., r, c] = weights[..., inside, keys[c] : keys[c + 1]].sum((-2, -1)) / count
    return maps


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("size", [7, 64])
def test_readings_equal_eager(monkeypatch, family, size):
    """Left padding, windows, softcaps; heads read in turns; tiles of unequal size, and of one token."""
    monkeypatch.setattr(reader, "LIMIT", 2 * size * T)
    inputs, model = prompts(), tiny(family)
    before = snapshot(model)
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits[:, -1]
    record = observe.record(model, inputs | {"logits_to_keep": 0}, size=size)
    assert snapshot(model) == before
    assert torch.equal(record.logits, plain)
    weights, real = weights_of(family, inputs), inputs["attention_mask"]
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(record.maps, tiled(weights, record, inputs), **close)
    seen = (weights > 0).sum(3).clamp(min=1)
    torch.testing.assert_close(record.columns, weights.sum(3) / seen, **close)
    logs = -(weights * weights.clamp(min=1e-38).log()).sum(-1)[..., None]
    one = observe.record(model, inputs, size=T).entropy
    torch.testing.assert_close(one, logs[..., 0], **close)
    assert record.segments == ("first", "query")
    first = real.argmax(1)
    for b in range(2):
        expected = weights[:, b, :, :, int(first[b])]
        torch.testing.assert_close(observe.record(model, inputs, size=T).masses[:, b, ..., 0], expected, **close)
    torch.testing.assert_close(record.masses.sum(-1), record.maps.sum(-1), **close)


def test_sdpa_is_overheard_and_eager_attended_to(monkeypatch):
    calls = []
    kept = reader.attend
    monkeypatch.setattr(reader, "attend", lambda *a, **k: calls.append(1) or kept(*a, **k))
    model = tiny("llama")
    one = observe.record(model, prompts())
    with torch.inference_mode():
        two = observe.record(model, prompts())
    assert not calls
    assert torch.equal(one.maps, two.maps)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(observe.record(model, prompts()).maps, one.maps, atol=1e-5, rtol=1e-4)
    assert len(calls) == 3


def test_some_rows_of_a_long_prompt():
    inputs = prompts()
    record = observe.record(tiny("llama"), inputs, rows=(T - 5, T), size=T)
    weights = weights_of("llama", inputs)
    torch.testing.assert_close(record.maps, weights[..., -5:, :], atol=1e-5, rtol=1e-4)
    assert record.row_edges.tolist() == list(range(T - 5, T + 1))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_images_are_segments(family):
    inputs, model = prompts(), tiny(family)
    spans = [Span(0, 10, 14), Span(0, 20, 24), Span(1, 3, 7)]
    tokens = TokenMap.of_text(inputs["attention_mask"], spans)
    record = observe.record(model, inputs, tokens=tokens, size=T)
    assert record.segments == ("first", "query", "visual", "image 1", "image 2")
    visual, one, two = record.masses[..., 2:].unbind(-1)
    torch.testing.assert_close(visual, one + two)
    torch.testing.assert_close(visual[:, 1], record.maps[:, 1, ..., 3:7].sum(-1))


def test_sinks_and_norms():
    """A planted sink: one token with a massive state, one key that all rows of one head prefer."""
    model, inputs = tiny("llama"), prompts()
    states = []
    hook = model.model.layers[1].register_forward_pre_hook(
        lambda m, a, k: states.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    record = observe.record(model, inputs)
    hook.remove()
    torch.testing.assert_close(record.stream[1], states[0].norm(dim=-1))
    peaks = states[0].abs().amax(-1) / states[0].square().mean(-1).sqrt()
    torch.testing.assert_close(record.peaks[1], peaks, rtol=1e-2, atol=1e-2)
    found = record.sinks(theta=float(record.columns.max()) - 1e-6, tau=float(record.peaks[:, 1].max()) - 1e-6, least=1)
    place = torch.unravel_index(record.columns.argmax(), record.columns.shape)
    assert found.token.nonzero().tolist() == [[int(i) for i in place]]
    assert found.massive[:, 1].sum() == 1
    assert not record.sinks(theta=0.0, least=T + 1).token.any()
    tokens = TokenMap.of_text(inputs["attention_mask"], [Span(1, 3, 7)])
    seen = observe.record(model, inputs, tokens=tokens, readings=("sinks",)).sinks(tau=0.0)
    assert seen.massive.sum() == 3 * (2 * T - PADDING)
    assert seen.visual.nonzero()[:, 2].unique().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama", "qwen2", "gemma2", "gpt2")])
def test_every_family_runs_as_it_is(family):
    model, inputs = tiny(family), prompts(12)
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits[:, -1]
    record = observe.record(model, inputs | {"logits_to_keep": 0}, readings=("columns",))
    assert torch.equal(record.logits, plain)


WRONG = [
    ({"readings": ("mases",)}, r"unknown reading 'mases'.*Did you mean 'masses'"),
    ({"size": 0}, "size must be at least 1"),
    ({"rows": (3, T + 1)}, "rows 3 to 42 are out of range"),
    ({"segments": {"late": torch.ones(1, T, dtype=torch.bool)}}, r"segment 'late' lies over padding: row 0, arrival 0"),
    ({"segments": {"short": torch.ones(1, 3, dtype=torch.bool)}}, r"segment 'short' must be bool \[1 or 2, 41\]"),
    ({"tokens": TokenMap.of_text(torch.ones(1, 5))}, "the token map is of 1 rows and 5 arrivals"),
    ({"dims": (32,)}, "dimension 32 is out of range"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=[words[:20] for _, words in WRONG])
def test_wrong_options_leave_the_model_alone(options, words):
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(RegardError, match=words):
        observe.record(model, prompts(), **options)
    assert snapshot(model) == before


def test_nan_names_the_layer_and_what_was_not_read_is_named():
    model, inputs = tiny("llama"), prompts()
    record = observe.record(model, inputs, readings=("columns",))
    with pytest.raises(RegardError, match=r"maps was not read: ask for it with readings=\(..., 'maps'\)"):
        record.thumbnails()
    with pytest.raises(RegardError, match="layer 3 is out of range; there are 3"):
        record.head(3, 0)
    with pytest.raises(RegardError, match="head -1 is out of range"):
        record.head(0, -1)
    assert record.head(2, 1, row=1)["columns"].shape == (T,)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(RegardError, match="layer 1 is the first whose attention scores hold NaN"):
        observe.record(model, inputs)


def test_bad_prompts():
    model, given = tiny("llama"), prompts()
    with pytest.raises(RegardError, match="a prompt of ids"):
        observe.record(model, {"attention_mask": given["attention_mask"]})
    with pytest.raises(RegardError, match=r"attention_mask is \[2, 3\]"):
        observe.record(model, given | {"attention_mask": torch.ones(2, 3)})
    with pytest.raises(RegardError, match="row 1 of the prompt is padding alone"):
        observe.record(model, given | {"attention_mask": torch.tensor([[1], [0]]).expand(2, T)})
