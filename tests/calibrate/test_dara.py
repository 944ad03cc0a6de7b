"""Training of DARA's factors: a model that answers from text looks at images afterwards, and nothing else changes."""

import pytest
import torch
import transformers as tf

import regard
import vlms
from regard import RegardError
from regard.calibrate import dara as fitting
from regard.calibrate.dara import Shots
from regard.core.token_map import Span, TokenMap

RED, BLUE, ASK = 3, 4, 7
# Demonstrations in words, and image tokens that are red or blue.
WORDS, SEEN = (1, 2), {RED: 14, BLUE: 15}
TEXT, IMAGE, PRIOR = 0, 1, {RED: 2, BLUE: 3}


def biased(heads=2, size=8):
    """A decoder whose words have higher scores than images, and vote for what was said in the demonstrations."""
    config = tf.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=size, rope_parameters={"rope_type": "default", "rope_theta": 1e24},
        tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    attention, slow = model.model.layers[0].self_attn, size // 2 - 1
    embed = model.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        embed[[*WORDS, ASK], TEXT] = 1
        for word, answer in zip(WORDS, (RED, BLUE), strict=True):
            embed[word, PRIOR[answer]] = 1
        for answer, token in SEEN.items():
            embed[token, IMAGE] = embed[token, PRIOR[answer]] = 1
        for head in range(heads):
            at = head * size
            attention.q_proj.weight[at + slow, TEXT] = 1
            attention.k_proj.weight[at + slow, [TEXT, IMAGE]] = torch.tensor([1.2, 0.6])
            for offset, part in enumerate(PRIOR.values()):
                attention.v_proj.weight[at + offset, part] = 1
                attention.o_proj.weight[part, at + offset] = 1
        for answer, part in PRIOR.items():
            model.lm_head.weight[answer, part] = 4
    return model


def shots(seed, count=8):
    """Demonstrations that say one colour, and an image of either; the image's colour is asked for."""
    drawn, made = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        said, seen = torch.randint(2, (2,), generator=drawn).tolist()
        answer = (RED, BLUE)[seen]
        prompt = torch.tensor([WORDS[said]] * 4 + [SEEN[answer]] * 3 + [ASK])
        told = TokenMap.of_text(torch.ones(1, len(prompt)), (Span(0, 4, 7),))
        made.append(Shots(prompt, torch.tensor([answer]), tokens=told))
    return made


@torch.no_grad()
def right(model, items, **placed):
    """Share of `items` answered rightly, and the mean of the image's attention at the answering row."""
    hits, masses = 0, []
    factors = placed.get("factors", torch.ones(2, 2, 1))
    attention = model.model.layers[0].self_attn
    for one in items:
        handle = regard.attach(model, [regard.place("dara", **placed)] if placed else [])
        with handle, handle.reading(one.tokens):
            hits += int(model(one.prompt[None]).logits[0, -1].argmax()) == int(one.answer)
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(one.prompt))
        q, k = (part(x).unflatten(-1, (2, -1)).transpose(0, 1) for part in (attention.q_proj, attention.k_proj))
        scores = (q[:, -1:] @ k.transpose(1, 2))[:, 0] * 8**-0.5
        scores[:, 4:7] *= factors[0]
        masses.append(float(scores.softmax(-1)[:, 4:7].sum(-1).mean()))
    return hits / len(items), sum(masses) / len(masses)


def test_a_model_that_answers_from_words_learns_to_look():
    model, told = biased(), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = fitting.fit(model, shots=shots(0), epochs=4, rate=0.1, progress=lambda *x: told.append(x))
    factors = found["factors"]
    assert told[-1] == (32, 32)
    assert factors.shape == (2, 2, 1)
    assert torch.equal(factors[1], torch.ones(2, 1))
    held = shots(1, 24)
    blind, looked = right(model, held)
    seeing, looks = right(model, held, factors=factors, layers=(0,))
    assert blind < 0.75
    assert seeing == 1
    assert looks > looked + 0.1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    text = torch.tensor([[*WORDS, ASK]])
    with torch.no_grad():
        plain = model(text).logits
        handle = regard.attach(model, [regard.place("dara", factors=factors)])
        with handle, handle.reading(TokenMap.of_text(torch.ones_like(text))):
            assert torch.equal(model(text).logits, plain)


@pytest.mark.parametrize("mode", ["scale", "add"])
def test_a_model_that_sees_is_read_by_its_processor_s_layout(mode):
    model, _ = vlms.tiny("llava")
    model = model.float()
    prompt = torch.tensor([vlms.BOS, *[vlms.IMAGE] * 16, 5, *[vlms.IMAGE] * 16, 6])
    one = Shots(prompt, torch.tensor([11]), {"pixel_values": vlms.pixels(2, 3, 16, 16)})
    assert torch.equal(
        fitting.fit(model, shots=[one], mode=mode, epochs=0)["factors"], torch.full((2, 4, 2), float(mode == "scale"))
    )
    found = fitting.fit(model, shots=[one], mode=mode, epochs=2)["factors"]
    assert (found[0] != float(mode == "scale")).all()


def test_what_cannot_be_learnt_from_is_named():
    model, one = biased(), shots(0, 1)[0]
    with pytest.raises(RegardError, match="fitted on prompts with images; got none"):
        fitting.fit(model, shots=[])
    with pytest.raises(RegardError, match="prompt 0 has no image"):
        fitting.fit(model, shots=[Shots(one.prompt, one.answer)])
    with pytest.raises(RegardError, match="the answer of prompt 1"):
        fitting.fit(model, shots=[one, Shots(one.prompt, one.answer[:0], tokens=one.tokens)])
    with pytest.raises(RegardError, match="layer 2 is out of range"):
        fitting.fit(model, shots=[one], layers=(2,))
    with pytest.raises(RegardError, match="one layer at least"):
        fitting.fit(model, shots=[one], layers=())
    with pytest.raises(RegardError, match="rate must be above 0"):
        fitting.fit(model, shots=[one], rate=0.0)
