"""Head roles: heads planted by hand are found and no others, and switching heads off does just that."""

import math

import pytest
import torch
import transformers as tf

from contracts.snapshot import snapshot
from families import tiny
from regard import observe
from regard.core.errors import RegardError
from regard.core.token_map import Span, TokenMap

HEAD, CODE, VOCABULARY, HEADS = 64, 32, 160, 3
# Rotary pairs from this one on do not turn: what is written there does not mind positions.
STILL = 16


def planted():
    """Two layers of attention: a previous-token head and a sink head, then an induction head that reaches anything and
    one that is held back with distance; one head in each layer looks everywhere alike.

    Dimensions: the token's code, a one, the mark of the first token, the code of the token before.
    """
    width = 2 * CODE + 2
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=HEAD, max_position_embeddings=512, bos_token_id=0, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e16}, pad_token_id=None,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    one, first = CODE, CODE + 1
    before = slice(CODE + 2, width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        codes = torch.randn(VOCABULARY, CODE, generator=torch.Generator().manual_seed(0)).sign()
        model.model.embed_tokens.weight[:, :CODE] = codes
        model.model.embed_tokens.weight[:, one] = 1
        model.model.embed_tokens.weight[0, first] = 4
        zero, up = (layer.self_attn for layer in model.model.layers)
        # A score that is largest one token back: sum_i cos(f_i (distance - 1)) over the pairs that turn.
        for pair in range(6):
            turn = 1e16 ** (-pair / (HEAD // 2))
            zero.k_proj.weight[pair, one] = 9.0
            zero.q_proj.weight[pair, one] = 9.0 * math.cos(turn)
            zero.q_proj.weight[pair + HEAD // 2, one] = -9.0 * math.sin(turn)
        zero.v_proj.weight[:CODE, :CODE] = torch.eye(CODE)
        zero.o_proj.weight[before, :CODE] = torch.eye(CODE)
        # A sink head: every row looks for the mark.
        zero.q_proj.weight[HEAD + STILL, one] = 20.0
        zero.k_proj.weight[HEAD + STILL, first] = 20.0
        places = torch.cat((torch.arange(STILL, 2 * STILL), torch.arange(STILL, 2 * STILL) + HEAD // 2))
        for head in range(2):
            up.q_proj.weight[head * HEAD + places, :CODE] = 6 * torch.eye(CODE)
            up.k_proj.weight[head * HEAD + places, before] = 6 * torch.eye(CODE)
            up.v_proj.weight[head * HEAD : head * HEAD + CODE, :CODE] = torch.eye(CODE)
        # Held back: a cosine that has fallen by much after two hundred tokens.
        pair = 4
        for weight in (up.q_proj.weight, up.k_proj.weight):
            weight[HEAD + pair, one] = 60.0
    return model


def test_planted_heads_are_found_and_no_others():
    model = planted()
    before = snapshot(model)
    found = observe.roles(model, length=24, haystack=128, batch=3)
    assert snapshot(model) == before
    assert found.of("previous") == [(0, 0)]
    assert found.of("sink") == [(0, 1)]
    assert sorted(found.of("induction")) == [(1, 0), (1, 1)]
    assert found.of("retrieval") == [(1, 0)]
    assert found.of("local") == [(0, 0)]
    assert found.at(1, 0) == ("induction", "retrieval")
    assert found.at(0, 2) == found.at(1, 2) == ()
    least = torch.stack([found.scores[role][place] for role, place in [("previous", (0, 0)), ("induction", (1, 0))]])
    assert least.min() > 0.9
    again = observe.roles(model, length=24, haystack=128, batch=3)
    assert all(torch.equal(found.scores[role], again.scores[role]) for role in found.scores)


def test_an_induction_head_needs_the_previous_token_head_below():
    """Its output is what came after the token the first time; with the head below switched off it is not."""
    model = planted()
    order = torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(1))[:20] + 1
    ids = torch.cat((torch.zeros(1, dtype=torch.long), order, order))[None]
    assert observe.record(model, ids, size=64).maps[1, 0, 0, 30, 11] > 0.9
    seen = []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0][0, 30]))
    for off in ([], [(0, 2)], [(0, 0)]):
        with observe.ablated(model, off), torch.no_grad():
            model(ids)
    hook.remove()
    code = model.model.embed_tokens.weight[ids[0, 11], :CODE].detach()
    right = [float(torch.cosine_similarity(out[:CODE], code, 0)) for out in seen]
    assert min(right[:2]) > 0.9
    assert right[2] < 0.5
    with observe.ablated(model, []), pytest.raises(RegardError, match="attached already"):
        observe.record(model, ids)


def test_ablated_is_the_output_projection_without_these_columns():
    model, ids = tiny("qwen2"), torch.randint(2, 90, (2, 15), generator=torch.Generator().manual_seed(0))
    with observe.ablated(model, [(1, 2), (1, 0), (2, 3)]), torch.no_grad():
        found = model(ids).logits
    with torch.no_grad():
        for layer, head in [(1, 2), (1, 0), (2, 3)]:
            model.model.layers[layer].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
        torch.testing.assert_close(found, model(ids).logits)


def test_vision_heads_are_read_from_a_record():
    model, ids = tiny("llava"), torch.randint(2, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    tokens = TokenMap.of_text(torch.ones_like(ids), [Span(0, 3, 7), Span(1, 4, 8)])
    record = observe.record(model, ids, tokens=tokens, size=20)
    found = observe.roles(model, record=record, length=16, haystack=40, batch=1)
    known = record.maps[:, 0, :, 7:, 3:7].sum(-1).sum(-1) + record.maps[:, 1, :, 8:, 4:8].sum(-1).sum(-1)
    torch.testing.assert_close(found.scores["vision"], known / (13 + 12))
    with pytest.raises(RegardError, match="no segment 'visual'; its segments are first, query"):
        observe.roles(model, record=observe.record(model, ids), length=16, haystack=40)


def test_bad_input():
    model = tiny("llama")
    with (
        pytest.raises(RegardError, match="layer 3 is out of range; this model has 3"),
        observe.ablated(model, [(3, 0)]),
    ):
        pass
    with pytest.raises(RegardError, match="head 4 is out of range; this model has 4"), observe.ablated(model, [(0, 4)]):
        pass
    with pytest.raises(RegardError, match="265 different tokens are needed, and the vocabulary has"):
        observe.roles(model)
    with pytest.raises(RegardError, match=r"unknown role 'inducton'.*Did you mean 'induction'"):
        observe.roles(model, thresholds={"inducton": 0.1})
    found = observe.roles(model, length=16, haystack=40, batch=1)
    with pytest.raises(RegardError, match="unknown role 'vision'"):
        found.of("vision")
