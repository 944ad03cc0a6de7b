import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.measure import measure, quality, recall, seconds, text


class Letters:
    """A tokenizer of single bytes."""

    def __call__(self, written, add_special_tokens=True, verbose=True):
        return {"input_ids": list(written.encode())}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    # Random small weights attend evenly and hide what a method does; larger ones tell keys apart.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.v_proj.weight *= 20
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def windows(tokens):
    return text.windows(tokens, 48, 16, 2)


METHODS = [
    Placement("streaming", "all", "all", {"sink": 2, "window": 8}),
    Placement("saw_int4", "all", "all", {"key_bits": 4, "value_bits": 16}),
    Placement("saw_int4", (1,), "all", {"key_bits": 16, "value_bits": 4}),
]


def test_no_placements_score_exactly_zero(model, windows):
    got = quality.quality(model, [], windows, chunk=5)
    assert got.kl == 0.0
    assert got.kl_last_half == 0.0
    assert got.top1 == 1.0
    assert got.perplexity_ratio == 1.0


@pytest.mark.parametrize("chunk", [1, 7, 32])
@pytest.mark.parametrize("method", METHODS, ids=lambda p: f"{p.stem}-{p.layers}")
def test_a_method_that_loses_something_scores_above_zero(model, windows, method, chunk):
    got = quality.quality(model, [method], windows, chunk=chunk)
    assert got.kl > 1e-9
    assert got.kl_worst >= got.kl
    assert len(got.windows) == 2
    assert got.kl == pytest.approx(sum(w.kl for w in got.windows) / 2)


@pytest.mark.parametrize("method", METHODS, ids=lambda p: f"{p.stem}-{p.layers}")
def test_chunks_do_not_change_the_score(model, windows, method):
    one, many = (quality.quality(model, [method], windows, chunk=c).kl for c in (1, 16))
    assert one == pytest.approx(many, rel=1e-2)


def test_the_score_is_the_definition_written_out(model, windows):
    method = METHODS[0]
    window = windows[0]
    got = quality.quality(model, [method], [window], chunk=4).windows[0]
    from regard.adapters.install import install

    ids = torch.cat([window.context, window.continuation])[None]
    with torch.no_grad():
        dense = model(ids).logits[0, 48:].double().log_softmax(-1)
        with install(model, [method]):
            ours = model(ids).logits[0, 48:].double().log_softmax(-1)
    kl = (dense.exp() * (dense - ours)).sum(-1)
    assert got.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert got.kl_last_half == pytest.approx(kl[8:].mean().item(), rel=1e-3)
    nll = -ours[:-1].gather(-1, window.continuation[1:, None]).mean()
    assert got.nll == pytest.approx(nll.item(), rel=1e-4)


def test_nan_is_an_error_not_a_score(model, windows):
    reference = quality.dense(model, windows, 8)
    weight = model.lm_head.weight
    kept = weight[3].clone()
    with torch.no_grad():
        weight[3] = math.nan
    try:
        with pytest.raises(RegardError, match="yields NaN"):
            quality.quality(model, [METHODS[0]], windows, 8, reference)
    finally:
        with torch.no_grad():
            weight[3] = kept


def test_a_reference_of_other_windows_is_refused(model, windows):
    reference = quality.dense(model, windows, 8)
    with pytest.raises(RegardError, match="other windows"):
        quality.quality(model, [], windows[:1], 8, reference)
    with pytest.raises(RegardError, match="another chunk"):
        quality.quality(model, [], windows, 4, reference)
    with pytest.raises(RegardError, match="chunk"):
        quality.dense(model, windows, 0)


def test_the_model_is_left_as_it_was(model, windows):
    model.train()
    try:
        quality.quality(model, [METHODS[0]], windows[:1], 8)
        assert model.training
        assert not model._forward_pre_hooks
    finally:
        model.eval()


def test_seconds_are_paired(model, tokens):
    got = seconds.seconds(model, [METHODS[0]], tokens[:64], steps=4, repeats=3, warmup=0)
    assert len(got.decode.ratio.values) == 3
    for ratio, ours, theirs in zip(
        got.decode.ratio.values, got.decode.method.values, got.decode.dense.values, strict=True
    ):
        assert ratio == pytest.approx(ours / theirs)
    assert got.context == 60
    assert got.prefill.ratio.low <= got.prefill.ratio.median <= got.prefill.ratio.high
    with pytest.raises(RegardError, match="more than 4 tokens"):
        seconds.seconds(model, [], tokens[:4], steps=4)


def test_control_strays_little(model, tokens):
    got = seconds.control(model, tokens[:64], steps=8, repeats=3)
    assert 0.3 < got.decode.ratio.median < 3


def test_spread():
    got = seconds.spread([1.0, 2.0, 10.0])
    assert (got.median, got.low, got.high, got.mad) == (2.0, 1.0, 10.0, 1.0)


def test_bytes_of_a_float32_model_are_counted_as_served(model, tokens):
    got = measure.measure(model, [], tokens, context=48, continuation=16, windows=2)
    assert got.bytes.ratio == 1.0
    assert got.bytes.live == 2 * got.bytes.dense
    small = measure.measure(model, [METHODS[1]], tokens, context=48, continuation=16)
    assert small.bytes.ratio < 1.0


def test_measurement_is_json_with_scores(model, tokens):
    got = measure.measure(
        model, [METHODS[0]], tokens, tokenizer=Letters(), context=48, continuation=16, repeats=1, steps=2, facts=2
    )
    told = json.loads(json.dumps(got.to_json()))
    assert set(told["scores"]) == set(measure.SCORES)
    assert told["quality"]["kl"] == got.quality.kl
    with pytest.raises(RegardError, match="tokenizer"):
        measure.measure(model, [], tokens, context=48, continuation=16, facts=2)


def test_planted_facts_can_be_found_in_the_context():
    planted = recall.plant(Letters(), torch.full((200,), 120), facts=4, seed=3)
    context, asked = (bytes(part.tolist()).decode() for part in (planted.context, planted.asked))
    answers = [asked[first:stop] for first, stop in planted.answers]
    assert len(set(answers)) == 4
    for depth, answer, (first, _) in zip(planted.depths, answers, planted.answers, strict=True):
        sentence = asked[: first + len(answer)].rpartition("\n")[2]
        assert sentence in context
        assert abs(context.index(sentence) / len(context) - depth) < 0.3
    assert recall.plant(Letters(), torch.full((200,), 120), 4, seed=3).asked.equal(planted.asked)
    with pytest.raises(RegardError, match="facts must be between"):
        recall.plant(Letters(), torch.zeros(200), facts=99)


def test_recall_tells_hits_from_misses(model):
    """An oracle that has read the context answers all; the untrained model answers nothing."""
    planted = recall.plant(Letters(), torch.full((100,), 120), facts=2)
    got = recall.recall(model, [METHODS[0]], planted)
    assert 0 <= got.recalled <= 1
    good = [[1.0, 2.0], [0.5]]
    half = [[1.0, -2.0], [0.5]]
    assert recall.recall(model, [], planted, reference=good).dense_recalled == 1.0
    assert recall.recall(model, [], planted, reference=half).dense_hits == (False, True)
    assert recall.recall(model, [], planted).margin == recall.recall(model, [], planted).dense_margin


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(2, 20), st.integers(1, 5), st.integers(0, 100))
def test_windows_are_disjoint_and_inside(context, continuation, count, more):
    size = context + continuation
    whole = torch.arange(size * count + more)
    cut = text.windows(whole, context, continuation, count, offset=7)
    seen = torch.cat([torch.cat([w.context, w.continuation]) for w in cut])
    assert len(set(seen.tolist())) == size * count
    assert all(w.start == w.context[0] + 7 for w in cut)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 50), st.integers(0, 500))
def test_parts_are_disjoint_and_large_enough(calibration, choosing, final, more):
    whole = torch.arange(calibration + choosing + final + more)
    parts = text.split(whole, choosing, final, calibration)
    assert torch.cat([parts.calibration, parts.choosing, parts.final]).equal(whole)
    assert len(parts.calibration) >= calibration
    assert len(parts.choosing) >= choosing
    assert len(parts.final) >= final
    assert parts.offsets[2] == len(whole) - len(parts.final)


def test_text_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(RegardError, match="does not exist"):
        text.load(tmp_path / "none.txt")
    for name, data, said in (("empty", b" \n", "is empty"), ("latin", b"caf\xe9", "not UTF-8.*byte 3")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RegardError, match=said):
            text.load(tmp_path / name)
    with pytest.raises(RegardError, match="cannot be read"):
        text.load(tmp_path)
    with pytest.raises(RegardError, match=r"has 10 tokens.*64 are needed"):
        text.windows(torch.zeros(10), 48, 16, 1)
    with pytest.raises(RegardError, match="100 are needed"):
        text.split(torch.zeros(10), 40, 50, 10)
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfhello")
    assert text.load(tmp_path / "bom") == "hello"
    assert text.tokenise(Letters(), "ab").tolist() == [97, 98]
    with pytest.raises(RegardError, match="empty"):
        text.tokenise(Letters(), " ")


def test_measurements_are_frozen(model, tokens):
    got = measure.measure(model, [], tokens, context=48, continuation=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.length = 1
