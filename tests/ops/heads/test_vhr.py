"""VHR [015]: heads chosen by what the image changes, against the definition run layer by layer on the bare model."""

from collections import Counter

import pytest
import torch
import transformers as tf

import regard
import vlms
from contracts.decoding import at_once, forced, prompts
from contracts.subjects import token_map
from families import tiny
from regard.adapters import tokens
from regard.core.placement import Where
from regard.core.token_map import Kind, Span, TokenMap
from regard.ops.heads import vhr

PROMPT, N = 14, 20
IMAGE, RED = 15, 3


def test_divergence_is_a_distance_that_surges_and_rounding_do_not_have():
    g = torch.Generator().manual_seed(0)
    full, blind = torch.randn(2, 2, 6, 8, generator=g, dtype=torch.float64)
    blind[1, 3] = 40 * full[1, 3]
    blind[0, 2] = full[0, 2] * (1 + 1e-10)
    blind[0, 4] = 0.01 * full[0, 4]
    full[0, 4] *= 40
    told = torch.zeros(2, 6, dtype=torch.float64)
    for b in range(2):
        for h in range(6):
            told[b, h] = sum((x - y) ** 2 for x, y in zip(full[b, h], blind[b, h], strict=True)) ** 0.5
    told[0, 2] = 0
    torch.testing.assert_close(vhr.divergence(full, blind, "keep"), told)
    found = vhr.divergence(full, blind)
    surge = torch.zeros(2, 6, dtype=torch.bool)
    surge[1, 3] = True
    assert torch.equal(found == 0, surge | (told == 0))
    torch.testing.assert_close(found, told.masked_fill(surge, 0))


def test_at_most_half_are_chosen_and_equal_outputs_choose_none():
    told = torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 1.0]])
    assert vhr.chosen(told).tolist() == [[False, True, False, True], [False] * 4, [False] * 4]
    assert vhr.chosen(torch.tensor([1.0, 2.0, 3.0])).tolist() == [False, False, True]


def test_reinforcement_turns_the_stream_towards_the_head():
    g = torch.Generator().manual_seed(1)
    out, project, rest = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((1, 3, 1, 4), (8, 12), (8,)))
    alone = project[:, 4:8] @ out[0, 1, 0]
    cosines = []
    for alpha in (1.0, 1.5, 2.0, 4.0):
        more = vhr.reinforced(out, torch.tensor([[False, True, False]]), alpha)
        torch.testing.assert_close(project @ (more - out).flatten(), (alpha - 1) * alone)
        cosines.append(float(torch.cosine_similarity(rest + (project @ more.flatten()), alone, dim=0)))
    assert cosines == sorted(set(cosines))


class Bare:
    """The definition: the bare model run from the start for every layer, columns of its output projections scaled."""

    def __init__(self, model, heads, placed, alpha):
        self.model, self.heads, self.placed, self.alpha = model, heads, placed, alpha
        self.parts = [part for name, part in model.named_modules() if name.endswith("self_attn.o_proj")]

    @torch.no_grad()
    def run(self, given, chosen, first):
        """Logits, and head outputs `[H, D]` of row `first` by layer, with `chosen` heads scaled from that row on."""
        seen, hooks = {}, []
        for layer, part in enumerate(self.parts):

            def scaled(module, args, layer=layer):
                x = args[0].unflatten(-1, (self.heads, -1)).clone()
                seen[layer] = x[0, first].clone()
                if layer in chosen:
                    x[:, first:, chosen[layer]] *= self.alpha
                return (x.flatten(-2),)

            hooks.append(part.register_forward_pre_hook(scaled))
        try:
            return self.model(**given, use_cache=False).logits, seen
        finally:
            for hook in hooks:
                hook.remove()

    def choose(self, full, blind):
        """The chosen heads of every placed layer, of one prompt with the image and without."""
        last, other = (given["input_ids"].shape[1] - 1 for given in (full, blind))
        chosen = {}
        for layer in self.placed:
            with_image = self.run(full, chosen, last)[1][layer]
            without = self.run(blind, chosen, other)[1][layer]
            chosen[layer] = vhr.chosen(vhr.divergence(with_image, without))
        return chosen


def test_a_text_model_told_of_an_image_follows_the_definition():
    """Padded rows, some layers, and a prompt in pieces."""
    model = tiny("llama").double()
    ids, mask = prompts(length=N)
    told = token_map(2, torch.tensor([4, 0]))
    placed = (1, 2)
    handle = regard.attach(model, [regard.place("vhr", layers=placed)])
    with handle, handle.reading(told), handle.prompting(PROMPT):
        found = at_once(model, ids, mask)
        torch.testing.assert_close(forced(model, ids, mask, [3, 9, PROMPT, 17]), found)
    for row, pad in enumerate((4, 0)):
        own = ids[row : row + 1, pad:]
        kept = told.kinds[row, pad:] != Kind.VISUAL
        prompt = own[:, : PROMPT - pad]
        blind = prompt[:, torch.cat((kept, kept.new_ones(N)))[: PROMPT - pad]]
        bare = Bare(model, 4, placed, 2.0)
        chosen = bare.choose({"input_ids": prompt}, {"input_ids": blind})
        assert sum(int(heads.sum()) for heads in chosen.values()) == 4
        logits, _ = bare.run({"input_ids": own}, chosen, PROMPT - pad - 1)
        torch.testing.assert_close(found[row : row + 1, pad:], logits)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_model_that_sees_follows_the_definition(name):
    """Image tokens and pixels taken out of the prompt, positions counted anew."""
    model, batch = vlms.tiny(name)
    real = batch["attention_mask"][1].bool()
    one = {"input_ids": batch["input_ids"][1:, real]}
    if "image_grid_thw" in batch:
        skipped = int(batch["image_grid_thw"][0].prod())
        one |= {"pixel_values": batch["pixel_values"][skipped:], "image_grid_thw": batch["image_grid_thw"][1:]}
        one["mm_token_type_ids"] = (one["input_ids"] == vlms.IMAGE).long()
    else:
        one["pixel_values"] = batch["pixel_values"][1:]
    blind = {"input_ids": one["input_ids"][:, one["input_ids"][0] != vlms.IMAGE]}
    told = tokens.read(model, one)
    with regard.attach(model, [regard.place("vhr")]) as handle, handle.reading(told), torch.no_grad():
        found = model(**one, use_cache=True, output_hidden_states=True)
        made = model.generate(**one, max_new_tokens=4, do_sample=False)
    assert len(found.hidden_states) == 3
    bare = Bare(model, 4, (0, 1), 2.0)
    chosen, last = bare.choose(one, blind), told.length - 1
    logits, _ = bare.run(one, chosen, last)
    torch.testing.assert_close(found.logits, logits)
    assert int(logits[0, -1].argmax()) == int(made[0, told.length])
    assert not torch.allclose(bare.run(one, {}, last)[0], logits, atol=1e-6)


def planted(heads=4, size=8):
    """One layer whose heads 1 and 3 read images alone, and write "red"; the others read text alone."""
    config = tf.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=size, rope_parameters={"rope_type": "default", "rope_theta": 1e24},
        tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval().double()
    text, image, red, sky = range(4)
    attention, slow = model.model.layers[0].self_attn, size // 2 - 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        model.model.embed_tokens.weight[:, text] = 1
        model.model.embed_tokens.weight[IMAGE] = torch.eye(32, dtype=torch.float64)[image]
        for head in range(heads):
            reads = image if head in (1, 3) else text
            attention.q_proj.weight[head * size + slow, text] = 5
            attention.k_proj.weight[head * size + slow, reads] = 5
            attention.v_proj.weight[head * size, reads] = 1
            attention.o_proj.weight[red if head in (1, 3) else sky, head * size] = 0.1
        model.lm_head.weight[RED, red] = 1
        model.lm_head.weight[5, sky] = 1
    return model


def test_planted_heads_are_found_and_their_answer_grows_likelier():
    model, ids = planted(), torch.tensor([[1, IMAGE, IMAGE, IMAGE, 4, 6, 7]])
    said = TokenMap.of_text(torch.ones_like(ids), (Span(0, 1, 4),))
    likely = []
    for alpha in (1.0, 1.5, 2.0):
        with regard.attach(model, [regard.place("vhr", alpha=alpha)]) as handle, handle.reading(said), torch.no_grad():
            out = model(ids, use_cache=True)
        likely.append(float(out.logits[0, -1].log_softmax(-1)[RED]))
        if alpha > 1:
            (layer,) = out.past_key_values.store_layers()
            assert layer.store.state[vhr.CHOSEN].tolist() == [[False, True, False, True]]
    assert likely == sorted(set(likely))


def test_it_costs_one_prefill_without_the_image_as_far_as_it_is_placed():
    model = tiny("llama")
    ids, _ = prompts(length=N, padding=0)
    ran, blocks = Counter(), model.model.layers
    hooks = [
        block.mlp.register_forward_pre_hook(lambda m, args, layer=layer: ran.update([(layer, args[0].shape[1])]))
        for layer, block in enumerate(blocks)
    ]
    with regard.attach(model, [regard.place("vhr", layers=(1,))]) as handle, handle.reading(token_map(2)):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    for hook in hooks:
        hook.remove()
    without = N - 5
    assert ran == {**{(layer, N): 1 for layer in range(3)}, (0, without): 1, (1, without): 1} | {
        (layer, 1): 2 for layer in range(3)
    }


def test_what_cannot_be_compared_is_refused():
    model, (ids, mask) = tiny("llama"), prompts(length=N, padding=0)
    with pytest.raises(regard.RegardError, match="'vhr' has alpha=0"):
        regard.attach(model, [regard.place("vhr", alpha=0.0)])
    with pytest.raises(regard.RegardError, match="'vhr' decides over whole layers"):
        regard.attach(model, [regard.place("vhr", heads=(0,))])
    assert vhr.mix(Where(0, 1, 4, 2, 8, (0, 1)), alpha=1.0, outliers="drop") is None
    with regard.attach(model, [regard.place("vhr")]) as handle, torch.no_grad():
        with pytest.raises(regard.RegardError, match="'vhr' needs to know what the tokens are"):
            at_once(model, ids, mask)
        with handle.reading(TokenMap.of_text(mask)), pytest.raises(regard.RegardError, match="'vhr' needs visual"):
            at_once(model, ids, mask)
        ending = TokenMap.of_text(mask, (Span(0, N - 2, N), Span(1, N - 2, N)))
        with handle.reading(ending), pytest.raises(regard.RegardError, match="which the token map gives to an image"):
            at_once(model, ids, mask)
        marked = pytest.raises(regard.RegardError, match="marks name rows of the prompt with its image")
        with handle.reading(token_map(2)), handle.marking((1, 3)), marked:
            at_once(model, ids, mask)
        with handle.reading(token_map(2)):
            with handle.prompting(PROMPT):
                cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
            with handle.prompting(N), pytest.raises(regard.RegardError, match="did not see the first 14"):
                model(ids[:, PROMPT:], past_key_values=cache)
    with torch.no_grad():
        assert at_once(model, ids, mask).isfinite().all()
