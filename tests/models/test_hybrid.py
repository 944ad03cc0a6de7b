"""Hybrid decoders: every mixer beside softmax attention, as a transformers model."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from regard.core.errors import RegardError
from regard.layers import mixers
from regard.models import hybrid, layouts
from regard.models.hybrid import HybridConfig, HybridForCausalLM

WIDTH, HEADS, VOCAB = 32, 2, 61
NAMES = mixers.names()
OTHERS = [name for name in NAMES if name != "softmax"]


def made(stems, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    config = HybridConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=HEADS, mixers=stems, initializer_range=0.2, **options
    )
    return HybridForCausalLM(config).to(dtype).eval()


def text(rows, tokens, seed=1):
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(model, ids, cuts, mask=None):
    """Logits of `ids` fed in pieces through one cache."""
    cache, out = model.cache(), []
    for a, b in itertools.pairwise((0, *cuts, ids.shape[1])):
        piece = None if mask is None else mask[:, :b]
        out.append(model(ids[:, a:b], attention_mask=piece, past_key_values=cache).logits)
        assert cache.get_seq_length() == b
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("per_softmax", [0, 1, 3, None])
@pytest.mark.parametrize("name", OTHERS)
def test_decoding_equals_one_forward(name, per_softmax):
    model, ids = made(layouts.ratio(name, per_softmax, layers=4)), text(2, 15)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    pieces, _ = decoded(model, ids, (6, 7, 8, 12, 13, 14))
    torch.testing.assert_close(pieces, whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_is_not_there(name):
    model, ids = made([name, "softmax", name]), text(1, 12)
    padded = torch.cat((torch.zeros(1, 4).long(), ids), 1)
    mask = (torch.arange(16) >= 4).long()[None]
    with torch.no_grad():
        alone = model(ids).logits
        at_once = model(padded, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(at_once, alone, atol=1e-10, rtol=0)
    torch.testing.assert_close(decoded(model, padded, (2, 9, 10), mask)[0][:, 4:], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "norm": "layer", "mlp": "none"}], ids=["rms", "mqar"])
def test_packed_sequences_equal_separate_ones(options):
    model, ids = made(["kda", "softmax", "retnet"], **options), text(1, 12)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor([0, 5, 12])).logits
        alone = torch.cat((model(ids[:, :5]).logits, model(ids[:, 5:]).logits), 1)
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=0)


def by_hand(model, ids, tokens):
    for _ in range(tokens):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, best), 1)
    return ids


@pytest.mark.parametrize("name", NAMES)
def test_generate_is_greedy_by_hand(name):
    model, ids = made([name, "softmax"]), text(3, 7)
    assert model.generate(ids, max_new_tokens=8).tolist() == by_hand(model, ids, 8).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_generate_from_a_padded_batch(name):
    """Rows of different lengths, padded on the left, go on as each would alone."""
    model, short, long = made([name, "softmax"]), text(1, 4), text(1, 9, seed=2)
    both = torch.cat((torch.cat((torch.zeros(1, 5).long(), short), 1), long))
    mask = torch.ones_like(both)
    mask[0, :5] = 0
    out = model.generate(both, attention_mask=mask, max_new_tokens=6)
    assert out[0, 5:].tolist() == by_hand(model, short, 6)[0].tolist()
    assert out[1].tolist() == by_hand(model, long, 6)[0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_beams_do_not_need_the_cache(name):
    """Beam search reorders what is remembered; without a cache there is nothing to reorder."""
    model, ids = made([name, "softmax", name]), text(2, 6)
    call = {"max_new_tokens": 7, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    assert model.generate(ids, **call).tolist() == model.generate(ids, use_cache=False, **call).tolist()


def test_sampling_follows_the_seed():
    model, ids = made(["gla", "softmax"]), text(2, 6)
    runs = []
    for cached in (True, False):
        torch.manual_seed(5)
        runs.append(model.generate(ids, do_sample=True, max_new_tokens=6, use_cache=cached).tolist())
    assert runs[0] == runs[1]


# Numbers per layer and row, from the sheets: state [H, D, Dv] and the last 3 inputs of each convolution.
HELD = {
    "delta_net": HEADS * 16 * 16 + 3 * 3 * WIDTH,
    "gated_delta_net": HEADS * 16 * 32 + 3 * (2 * WIDTH + 2 * WIDTH),
    "gla": HEADS * 8 * 16,
    "hgrn": WIDTH,
    "hgrn2": HEADS * 16 * 16,
    "kda": HEADS * 16 * 16 + 3 * 3 * WIDTH,
    "retnet": HEADS * 16 * 32,
    "tnl": HEADS * 16 * 16,
}


@pytest.mark.parametrize("name", HELD)
def test_bytes_do_not_grow_with_the_text(name):
    model = made([name] * 2, torch.float32, mixer_options={"tnl": {"positions": False}} if name == "tnl" else None)
    for tokens in (5, 40):
        _, cache = decoded(model, text(3, tokens), (4,))
        assert cache.nbytes == 2 * 3 * 4 * HELD[name]


@pytest.mark.parametrize("per_softmax", [1, 3])
def test_key_value_bytes_shrink_by_the_ratio(per_softmax):
    """Exactly r + 1 times less, beside states of a fixed size."""
    layers, ids = 4, text(2, 24)

    def held(stems):
        model = made(stems, torch.float32)
        return [decoded(model, ids[:, :n], (1,))[1].nbytes for n in (8, 24)]

    dense = held(["softmax"] * layers)
    mixed = held(layouts.ratio("gla", per_softmax, layers=layers))
    assert dense[1] == 2 * 2 * 24 * layers * WIDTH * 4
    assert (dense[1] - dense[0]) == (per_softmax + 1) * (mixed[1] - mixed[0])
    states = mixed[1] - dense[1] // (per_softmax + 1)
    assert states == 2 * 4 * HELD["gla"] * (layers - layers // (per_softmax + 1))


def test_latents_are_held_once():
    """(r + e) numbers a token and row, whatever the heads, and at most 16 spare slots while there are few."""
    model, ids = made(["mla"] * 2, torch.float32, mixer_options={"mla": {"rank": 20, "rope_size": 6}}), text(3, 24)
    _, cache = decoded(model, ids, ())
    assert cache.nbytes == 2 * 3 * (24 + 16) * 26 * 4
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    pieces, cache = decoded(model, ids, (10, 11, 17))
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=0)
    held = [layer.store.buffer.read()[0] for layer in cache.layers]
    assert [list(field.shape) for field in held] == [[3, 1, 24, 26]] * 2


def test_windows():
    """A sliding window in a layer: its cache layer keeps the window, and one forward equals decoding."""
    model, ids = made(["kda", "softmax"], mixer_options={"softmax": {"window": 4}}), text(1, 14)
    with torch.no_grad():
        whole = model(ids).logits
    pieces, cache = decoded(model, ids, (3, 9, 10, 11, 12, 13))
    torch.testing.assert_close(pieces, whole, atol=1e-10, rtol=0)
    assert cache.layers[1].keys.shape[-2] == 3
    padded = torch.cat((torch.zeros(1, 3).long(), ids), 1)
    mask = (torch.arange(17) >= 3).long()[None]
    torch.testing.assert_close(decoded(model, padded, (8, 9, 15), mask)[0][:, 3:], whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, tmp_path):
    model, ids = made([name, "softmax"], torch.float32), text(2, 9)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    with torch.no_grad():
        assert torch.equal(HybridForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_importing_registers_nothing():
    code = "import regard.models.hybrid, transformers; print('regard_hybrid' in transformers.CONFIG_MAPPING)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.slow
def test_trainer(tmp_path):
    """transformers' own Trainer, with gradient checkpointing, on a stream that counts."""
    pytest.importorskip("accelerate")
    model = made(["kda", "hgrn", "softmax"], torch.float32).train()
    rows = [{"input_ids": (ids := (torch.arange(16) + i) % VOCAB), "labels": ids} for i in range(32)]
    settings = TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[], save_strategy="no",
        gradient_checkpointing=True, disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_auto_classes_know_it_once_asked(tmp_path):
    made(["kda", "softmax"], torch.float32).save_pretrained(tmp_path)
    hybrid.register()
    hybrid.register()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HybridConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), HybridForCausalLM)


def test_loss_and_checkpointing():
    """Gradient checkpointing changes no gradient; shifted labels are read as they stand."""
    ids = text(2, 10)
    model = made(["kda", "hgrn2", "softmax", "gla"]).train()
    labels = ids.masked_fill(ids % 3 == 0, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss = model(ids, labels=labels).loss
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, loss)
    loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], atol=1e-12, rtol=1e-9)
    with pytest.raises(RegardError, match="under gradient checkpointing"):
        model(ids, past_key_values=model.cache())


def test_starting_weights():
    """Output projections start smaller by sqrt(2 layers); gates start as the papers say."""
    torch.manual_seed(0)
    config = HybridConfig(vocab_size=500, hidden_size=256, num_attention_heads=4, mixers=["kda"] * 3 + ["softmax"])
    model = HybridForCausalLM(config).model
    kda = model.layers[0].mixer
    assert kda.out.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert kda.inputs.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert kda.a.min() >= 0
    assert kda.a.max() <= torch.tensor(16.0).log()
    steps = torch.nn.functional.softplus(kda.bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 0.101
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_lower_bounds_rise_with_depth():
    bounds = hybrid.LowerBounds(4, {"hgrn": 3})
    torch.nn.init.normal_(bounds.raw["hgrn"])
    made_of = bounds()["hgrn"]
    assert made_of[0].tolist() == [0.0, 0.0, 0.0]
    assert (made_of.diff(dim=0) > 0).all()
    assert made_of[-1].max() < 1


def test_ratios():
    assert layouts.ratio("kda", 3, layers=8) == ["kda", "kda", "kda", "softmax"] * 2
    assert layouts.ratio("gla", 0, layers=3) == ["softmax"] * 3
    assert layouts.ratio("gla", None, layers=2) == ["gla"] * 2
    assert layouts.ratio("gla", 6, layers=4, recall=False) == ["gla"] * 4
    assert layouts.layout("gla", layers=4, softmax=[0, 2]) == ["softmax", "gla", "softmax", "gla"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: layouts.ratio("kda", 12, layers=4), "12:1 on 4 layers leaves no softmax layer.*at most 3:1"),
        (lambda: layouts.ratio("kda", -1, layers=4), "0 or more layers.*got -1"),
        (lambda: layouts.ratio("kdaa", 3, layers=4), "unknown mixer 'kdaa'.*Did you mean 'kda'"),
        (lambda: layouts.layout("kda", layers=4, softmax=[1, 4]), "softmax layer 4 is out of range.*0 to 3"),
        (lambda: layouts.layout("kda", layers=4, softmax=[1, 1]), "softmax layer 1 is named twice"),
        (lambda: HybridConfig(mixers=["kda"], num_hidden_layers=2), "one name for each of 2 layers, got 1 names"),
        (lambda: HybridConfig(mixers="kda"), "must be a list"),
        (lambda: HybridConfig(mixers=["kda", "sofmax"]), "layer 1: unknown mixer 'sofmax'.*'softmax'"),
        (lambda: HybridConfig(mixers=["kda"], mixer_options={"kda": {"saef": True}}), "'saef'.*Did you mean 'safe'"),
        (lambda: HybridConfig(mixers=["kda"], mixer_options={"gla": {}}), "unknown mixer in mixer_options 'gla'"),
        (lambda: HybridConfig(mixers=["kda"], mlp="swigl"), "unknown mlp 'swigl'.*'swiglu'"),
        (
            lambda: made(["gla", "kda"], mixer_options={"gla": {"heads": 3}}),
            r"layer 0 \(gla\).*do not divide among 3 heads",
        ),
    ],
)
def test_bad_layouts(call, match):
    with pytest.raises(RegardError, match=match):
        call()


def test_checkpoint_of_another_layout(tmp_path):
    """The layer and both mixers are named, and no weight is copied."""
    made(["kda", "softmax"], torch.float32).save_pretrained(tmp_path)
    other = made(["kda", "gla"], torch.float32, seed=1)
    before = copy.deepcopy(other.state_dict())
    expected = "layer 1 is 'softmax' in .* and 'gla' in this model"
    with pytest.raises(RegardError, match=expected):
        HybridForCausalLM.from_pretrained(tmp_path, config=other.config)
    with pytest.raises(RegardError, match=expected):
        HybridForCausalLM.from_pretrained(tmp_path, mixers=["kda", "gla"])
    with pytest.raises(RegardError, match=expected):
        other.load_state_dict(HybridForCausalLM.from_pretrained(tmp_path).state_dict(), strict=False)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    with pytest.raises(RegardError, match="past_key_values has 1 layers, this model 2"):
        other(text(1, 3), past_key_values=made(["kda"]).cache())


def test_drafts_and_crop_are_refused():
    model, ids = made(["kda", "softmax"], torch.float32), text(1, 6)
    for call in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": made(["softmax"], torch.float32)}):
        with pytest.raises(RegardError, match=r"cannot take tokens back.*prompt_lookup_num_tokens"):
            model.generate(ids, max_new_tokens=4, **call)
    _, cache = decoded(model, ids, ())
    held = cache.layers[1].keys
    with pytest.raises(RegardError, match="cannot remove the last 2 of 6 tokens: a recurrent state"):
        cache.crop(-2)
    assert cache.layers[1].keys is held
    assert cache.get_seq_length() == 6
    cache.crop(0)
    with pytest.raises(RegardError, match="cannot take tokens back"):
        cache.activate_past_recording()
    with pytest.raises(RegardError, match="cache_implementation 'static'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(RegardError, match=r"must be a HybridCache.*got DynamicCache"):
        model(ids, past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["softmax", "mla"])
def test_who_holds_tokens_takes_drafts_and_crops(name):
    model, ids = made([name, "softmax"]), text(1, 8)
    assert model.generate(ids, max_new_tokens=9, prompt_lookup_num_tokens=3).tolist() == by_hand(model, ids, 9).tolist()
    _, cache = decoded(model, ids, ())
    cache.crop(-3)
    with torch.no_grad():
        again = model(ids[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(again, model(ids).logits[:, 5:], atol=1e-10, rtol=0)


def test_a_prompt_is_read_once_for_many():
    """A copy of a cache goes on by itself; rows are repeated and selected with everything that is remembered."""
    model, ids = made(["gated_delta_net", "softmax", "mla", "retnet"]), text(2, 9)
    _, cache = decoded(model, ids[:, :6], ())
    with torch.no_grad():
        whole = model(ids).logits[:, 6:]
        for again in (copy.deepcopy(cache), cache):
            torch.testing.assert_close(model(ids[:, 6:], past_key_values=again).logits, whole, atol=1e-10, rtol=0)
        _, cache = decoded(model, ids[:, :6], ())
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, whole, atol=1e-10, rtol=0)


def test_a_cache_starts_again():
    model, ids = made(["retnet", "softmax", "mla"]), text(2, 7)
    first, cache = decoded(model, ids, (3,))
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, first, atol=1e-10, rtol=0)


def test_bad_calls():
    model, ids = made(["kda", "softmax"]), text(2, 5)
    with pytest.raises(RegardError, match=r"input_ids .* or inputs_embeds"):
        model()
    with pytest.raises(RegardError, match=r"attention_mask must be \[2, 5\]"):
        model(ids, attention_mask=torch.ones(2, 4))
    short = made(["softmax"], positions="learned", max_position_embeddings=4)
    with pytest.raises(RegardError, match="5 tokens, but positions are learned up to 4"):
        short(ids)
