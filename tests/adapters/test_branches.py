"""The second branch of a request: whichever way people decode, it equals two runs of the model without a cache."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import transformers as tf
from transformers import DynamicCache, LogitsProcessor

import regard
from contracts.decoding import GENERATE, at_once, forced, generated, possible, prompts
from contracts.replay import everything_kept
from families import _SMALL, VOCABULARY, tiny
from regard import RegardError
from regard.adapters.memory import live_bytes
from regard.measure.quality import quality
from regard.measure.text import windows
from regard.ops.logits import lqcd

ALPHA, CUE = 1.0, (5, 17, 40)
PLAIN = [regard.place("lqcd", alpha=ALPHA, beta=0.0)]
CUED = [regard.place("lqcd", alpha=ALPHA, beta=0.0, cue=CUE)]
STREAM = regard.place("streaming", sink=2, window=5)
SAMPLED = {**GENERATE, "sampling": {"do_sample": True, "top_k": 0}, "several": {"do_sample": True, "top_k": 0}}
SAMPLED["several"]["num_return_sequences"] = 2


@pytest.fixture(scope="module")
def llama():
    return tiny("llama").double()


def other(rows=2, length=13, padding=3):
    """A branch prompt of another length than the request's, its second row padded."""
    ids = torch.randint(2, VOCABULARY - 6, (rows, length), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, :padding] = 0
    return ids, mask


class Uncached(LogitsProcessor):
    """The definition: at every step the whole branch is run again, and contrasted."""

    def __init__(self, model, ids, mask, prompt):
        self.model, self.ids, self.mask, self.prompt = model, ids, mask, prompt

    def __call__(self, input_ids, scores):
        more = input_ids[:, self.prompt :]
        times = input_ids.shape[0] // self.ids.shape[0]
        ids, mask = (x.repeat_interleave(times, 0) for x in (self.ids, self.mask))
        ids, mask = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
        z = at_once(self.model, ids, mask)[:, -1]
        return ((1 + ALPHA) * scores - ALPHA * z).log_softmax(-1)


def run(model, way, tokens=10, processor=None):
    single = way == "prompt lookup"
    ids, mask = prompts(1 if single else 2, padding=0 if single else 4)
    more = {} if processor is None else {"logits_processor": [processor]}
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **SAMPLED[way], **more)


@pytest.mark.parametrize("way", SAMPLED)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen2_5_vl", "llava"])
def test_every_way_of_generating_equals_uncached_runs(family, way):
    if way != "several" and way not in possible(family):
        pytest.skip("this family does not decode in this way")
    model = tiny(family).double()
    rows = 1 if way == "prompt lookup" else 2
    ids, mask = other(rows, padding=0 if rows == 1 else 3)
    wanted = run(model, way, processor=Uncached(model, ids, mask, 21))
    own = run(model, way)
    with regard.attach(model, PLAIN) as handle, handle.branching(ids, mask):
        found = run(model, way)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, own)


def branch_logits(model, main, branch, prompt):
    """Logits of `main (ids, mask)` with rows from `prompt - 1` on contrasted, by two runs without a cache."""
    more = tuple(x[:, prompt:] for x in main)
    whole = tuple(torch.cat(pair, 1) for pair in zip(branch, more, strict=True))
    logits, z = at_once(model, *main), at_once(model, *whole)
    rows = more[0].shape[1] + 1
    mixed = (1 + ALPHA) * logits[:, -rows:] - ALPHA * z[:, -rows:]
    return torch.cat((logits[:, :-rows], mixed), 1)


@pytest.mark.parametrize("cuts", [[], [21], [5, 20, 23], list(range(1, 30))])
def test_forwards_of_any_size_are_contrasted_from_the_last_prompt_row_on(llama, cuts):
    main, branch = prompts(length=30), other()
    with regard.attach(llama, PLAIN) as handle, handle.branching(*branch), handle.prompting(21):
        found = forced(llama, *main, cuts)
        uncached = at_once(llama, *main)
    wanted = branch_logits(llama, main, branch, 21)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(uncached, wanted)


@pytest.mark.parametrize("keep", [1, 3, 12, torch.tensor([0, 22, 20, 29]), torch.tensor([3])])
def test_logits_to_keep_are_those_rows(llama, keep):
    (ids, mask), branch = prompts(length=30), other()
    wanted = branch_logits(llama, (ids, mask), branch, 21)
    wanted = wanted[:, -keep:] if isinstance(keep, int) else wanted[:, keep]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with regard.attach(llama, PLAIN) as handle, handle.branching(*branch), handle.prompting(21), torch.no_grad():
        out = llama(ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep)
        told = llama(ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, return_dict=False)
    torch.testing.assert_close(out.logits, wanted)
    assert torch.equal(told[0], out.logits)


def test_responding_ends_the_prompt_too(llama):
    (ids, mask), branch = prompts(length=30, padding=0), other()
    cache = DynamicCache(config=llama.config)
    with regard.attach(llama, PLAIN) as handle, torch.no_grad():
        first = llama(ids[:, :21], past_key_values=cache).logits
        with handle.responding(), handle.branching(*branch):
            one = llama(ids[:, 21:25], past_key_values=cache).logits
        # A branch that began goes on without being named again.
        with handle.responding():
            two = llama(ids[:, 25:], past_key_values=cache).logits
        assert cache.fork.branches[0].cache.prompt == 13
    wanted = branch_logits(llama, (ids, mask), branch, 21)
    torch.testing.assert_close(torch.cat((one, two), 1), wanted[:, 21:])
    torch.testing.assert_close(first, at_once(llama, ids, mask)[:, :21])


def test_a_new_turn_begins_the_branch_anew(llama):
    """The cue goes to the end of the whole conversation, not into its first turn."""
    ids = prompts(1, padding=0)[0]
    cache = DynamicCache(config=llama.config)
    said = {"do_sample": False, "max_new_tokens": 5}
    with regard.attach(llama, CUED):
        first = llama.generate(ids[:, :12], past_key_values=cache, **said)
        turn = torch.cat((first, ids[:, 12:]), 1)
        second = llama.generate(turn, past_key_values=cache, **said)
        assert torch.equal(llama.generate(turn, **said), second)
        cache.reset()
        assert cache.fork is None
        assert torch.equal(llama.generate(ids[:, :12], past_key_values=cache, **said), first)
    led = lqcd.insert(turn, torch.ones_like(turn), CUE, 0)
    wanted = llama.generate(turn, logits_processor=[Uncached(llama, *led, turn.shape[1])], **said)
    assert torch.equal(second, wanted)


def test_generating_twice_and_without_a_cache(llama):
    with regard.attach(llama, CUED):
        first = generated(llama, "greedy")
        assert torch.equal(generated(llama, "greedy"), first)
        ids, mask = prompts()
        none = llama.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=False)
    assert torch.equal(none, first)


def test_a_request_goes_on_after_detaching_and_attaching_again(llama):
    main, branch = prompts(length=30, padding=0), other()
    wanted, own = branch_logits(llama, main, branch, 21), at_once(llama, *main)
    ids, cache = main[0], DynamicCache(config=llama.config)
    with torch.no_grad():
        with regard.attach(llama, PLAIN) as handle, handle.prompting(21), handle.branching(*branch):
            one = llama(ids[:, :24], past_key_values=cache).logits
        with regard.attach(llama, PLAIN) as handle, handle.prompting(21):
            two = llama(ids[:, 24:28], past_key_values=cache).logits
        plain = llama(ids[:, 28:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat((one, two), 1)[:, 20:], wanted[:, 20:28])
        torch.testing.assert_close(plain, own[:, 28:])
        with (
            regard.attach(llama, PLAIN) as handle,
            handle.prompting(21),
            pytest.raises(RegardError, match="of the 30 before this forward it saw 28"),
        ):
            llama(ids[:, :1], past_key_values=cache)


def test_a_copied_cache_has_a_branch_of_its_own(llama):
    main, branch = prompts(length=30, padding=0), other()
    wanted, cache = branch_logits(llama, main, branch, 21), DynamicCache(config=llama.config)
    with regard.attach(llama, PLAIN) as handle, handle.prompting(21), handle.branching(*branch), torch.no_grad():
        llama(main[0][:, :24], past_key_values=cache)
        twin = copy.deepcopy(cache)
        for each in (cache, twin):
            found = llama(main[0][:, 24:], past_key_values=each).logits
            torch.testing.assert_close(found, wanted[:, 24:])


@pytest.mark.parametrize("length", [12, 20, 21, 24])
@pytest.mark.parametrize("recipe", [PLAIN, [STREAM, *PLAIN]], ids=["alone", "streaming"])
def test_cropping_takes_the_branch_along(llama, recipe, length):
    main, branch, cache = prompts(length=30, padding=0), other(), DynamicCache(config=llama.config)
    with regard.attach(llama, recipe) as handle, handle.prompting(21), handle.branching(*branch), torch.no_grad():
        wanted = at_once(llama, *main)
        llama(main[0][:, :5], past_key_values=cache)
        cache.activate_past_recording()
        llama(main[0][:, 5:], past_key_values=cache)
        cache.crop(length - 30)
        found = llama(main[0][:, length:], past_key_values=cache).logits
    torch.testing.assert_close(found, wanted[:, length:])


def test_a_crop_that_the_branch_cannot_follow_changes_nothing(llama):
    """The branch's prompt is longer than what its ring holds; the request's own ring still holds everything."""
    main, branch, cache = other(1, 9, 0), other(1, 60, 0), DynamicCache(config=llama.config)
    recipe = [regard.place("streaming", sink=2, window=10), *PLAIN]
    with regard.attach(llama, recipe) as handle, handle.prompting(6), handle.branching(*branch), torch.no_grad():
        llama(main[0], past_key_values=cache)
        before = live_bytes(cache)
        with pytest.raises(RegardError, match="cannot remove the last 2 of 9 tokens"):
            cache.crop(-2)
        assert (cache.get_seq_length(), live_bytes(cache)) == (9, before)


@pytest.mark.parametrize("way", GENERATE)
def test_both_branches_are_compressed(llama, way):
    """Streaming with a branch: real stores against stores that keep everything, and less of them."""
    recipe = [STREAM, *CUED]
    with regard.attach(llama, recipe):
        real = generated(llama, way)
    with everything_kept(), regard.attach(llama, recipe):
        assert torch.equal(generated(llama, way), real)
    with regard.attach(llama, CUED):
        assert not torch.equal(generated(llama, way), real)


def test_lora_is_contrasted_with_itself(llama):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(llama)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).double()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    wrapped.eval()
    ids, mask = other()
    wanted = run(wrapped, "greedy", processor=Uncached(wrapped, ids, mask, 21))
    with regard.attach(wrapped, PLAIN) as handle, handle.branching(ids, mask):
        assert torch.equal(run(wrapped, "greedy"), wanted)


def test_bytes_hold_the_branch_once_and_go_with_the_cache(llama):
    ids, _ = prompts(1, length=30, padding=0)
    own = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids, past_key_values=own)
        size = live_bytes(own) // 30
        with regard.attach(llama, CUED) as handle, handle.prompting(30):
            cache = DynamicCache(config=llama.config)
            llama(ids, past_key_values=cache)
            assert live_bytes(cache) == (30 + 30 + len(CUE)) * size
            assert handle.nbytes == live_bytes(cache)
            second = copy.deepcopy(cache)
            llama(ids[:, :1], past_key_values=second)
            assert handle.nbytes == live_bytes(cache) + live_bytes(second)
            beside = cache.fork.branches[0].cache
            watched = [weakref.ref(x) for x in (cache, beside, beside.layers[0].keys)]
            del cache, second, beside
            gc.collect()
            assert [ref() for ref in watched] == [None] * 3
            assert handle.nbytes == 0


def test_a_forward_that_fails_is_forgotten_and_the_next_is_right(llama):
    main, branch, cache = prompts(length=30, padding=0), other(), DynamicCache(config=llama.config)
    wanted = branch_logits(llama, main, branch, 21)
    with regard.attach(llama, PLAIN) as handle, handle.prompting(21), handle.branching(*branch), torch.no_grad():
        llama(main[0][:, :24], past_key_values=cache)
        with Failing(llama.model.layers[1], calls=2), pytest.raises(RuntimeError, match="broke"):
            llama(main[0][:, 24:27], past_key_values=cache)
        assert cache.fork.branches[0].cache is None
        found = llama(main[0][:, 27:], past_key_values=cache).logits
        torch.testing.assert_close(found, wanted[:, 27:])
        with Failing(llama.lm_head, calls=1), pytest.raises(RuntimeError, match="broke"):
            llama(main[0][:, :24])
        watched = weakref.ref(cache)
        del cache
        gc.collect()
        assert watched() is None


class Failing:
    """A module whose `calls`-th forward fails."""

    def __init__(self, module, calls):
        self.module, self.calls = module, calls

    def __enter__(self):
        self.hook = self.module.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.calls -= 1
        if not self.calls:
            raise RuntimeError("broke")

    def __exit__(self, *_):
        self.hook.remove()


CONTEXT = _SMALL["max_position_embeddings"]
LONG = torch.ones(2, CONTEXT + 1, dtype=torch.long)
PROMPTS = {
    "no tokens": (torch.ones(2, 0, dtype=torch.long), None, "branch prompt of 'lqcd' is empty: row 0 has 0 tokens"),
    "no rows": (torch.ones(0, 3, dtype=torch.long), None, "is empty"),
    "a row of padding": (LONG[:, :3], torch.tensor([[1, 1, 1], [0, 0, 0]]), "is empty: row 1 has 0 tokens"),
    "too long": (LONG, None, "has 257 tokens; this model's context is 256"),
    "other rows": (LONG[:, :4].repeat(2, 1)[:3], None, "has 3 rows, the request 2"),
    "beyond the vocabulary": (LONG[:, :4] * VOCABULARY, None, "has token 96; this model knows ids 0 to 95"),
    "below zero": (-LONG[:, :4], None, "has token -1"),
    "text": (["yes", "no"], None, "must be token ids .*, got list"),
    "embeddings": (torch.ones(2, 3, 32), None, r"must be token ids \[rows, tokens\], got torch.float32 \[2, 3, 32\]"),
    "another mask": (LONG[:, :4], torch.ones(2, 3), r"has shape \[2, 4\], and its mask \[2, 3\]"),
    "right padding": (LONG[:, :3], torch.tensor([[1, 1, 0], [1, 1, 1]]), "pad prompts on the left"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_bad_branch_prompts_are_refused_before_anything_runs(llama, name):
    ids, mask, message = PROMPTS[name]
    cache, prompt = DynamicCache(config=llama.config), prompts()[0]
    with regard.attach(llama, PLAIN) as handle:
        with pytest.raises(RegardError, match=message), handle.branching(ids, mask):
            llama.generate(prompt, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert cache.get_seq_length() == 0
        with handle.branching(*other()):
            llama.generate(prompt, past_key_values=cache, max_new_tokens=2, do_sample=False)


def test_a_branch_that_outgrows_the_context_stops_before_the_forward(llama):
    cache, ids = DynamicCache(config=llama.config), prompts()[0]
    with regard.attach(llama, PLAIN) as handle, handle.prompting(21), handle.branching(LONG[:, :CONTEXT]):
        llama(ids, past_key_values=cache)
        with pytest.raises(RegardError, match=r"256 tokens, and 1 more with what follows it; .* context is 256"):
            llama(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 21
    with regard.attach(llama, CUED) as handle, handle.prompting(254), pytest.raises(RegardError, match="257 tokens"):
        llama(LONG[:, :254])


def test_what_cannot_be_contrasted_is_refused(llama):
    ids, mask = prompts()
    cases = {
        "brings inputs_embeds": {"inputs_embeds": llama.get_input_embeddings()(ids)},
        "a loss is taken before": {"input_ids": ids, "labels": ids},
        "brings pixel_values": {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 8, 8)},
    }
    with regard.attach(llama, CUED) as handle, handle.prompting(21):
        for message, given in cases.items():
            with pytest.raises(RegardError, match=message):
                llama(attention_mask=mask, **given)
        with handle.marking((2, 5)), pytest.raises(RegardError, match="marks name rows of the prompt"):
            llama(ids, attention_mask=mask)
    with regard.attach(llama, PLAIN) as handle, handle.prompting(21), pytest.raises(RegardError, match="has no cue"):
        llama(ids)
    cache = DynamicCache(config=llama.config)
    with regard.attach(llama, CUED) as handle, handle.prompting(21):
        llama.model(ids[:, :4], past_key_values=cache)
        with pytest.raises(RegardError, match=r"of the 4 before this forward it saw 0"):
            llama(ids[:, 4:], past_key_values=cache)


def test_a_recipe_or_model_without_a_place_for_it_says_so(llama):
    with regard.attach(llama, [STREAM]) as handle, pytest.raises(RegardError, match=r"runs a second branch; .*lqcd"):
        handle.branching(*other())
    torch.manual_seed(0)
    bare = tf.LlamaModel(tf.LlamaConfig(**_SMALL))
    with pytest.raises(RegardError, match="'lqcd' edits logits, and LlamaModel has no language head"):
        regard.attach(bare, CUED)
    regard.attach(bare, [STREAM]).detach()


def test_at_its_neutral_setting_a_branch_may_be_named_and_changes_nothing(llama):
    own = run(llama, "greedy")
    with regard.attach(llama, [regard.place("lqcd", alpha=0.0)]) as handle, handle.branching(*other()):
        assert torch.equal(run(llama, "greedy"), own)


def test_equal_prompts_warn_and_change_nothing(llama):
    ids, mask = prompts()
    own = at_once(llama, ids, mask)
    with regard.attach(llama, PLAIN) as handle, handle.prompting(21):
        with handle.branching(ids, mask), pytest.warns(UserWarning, match="read the same prompt: nothing"):
            torch.testing.assert_close(at_once(llama, ids, mask), own)
        changed = torch.where(torch.tensor([[False], [True]]), (ids + 1) % 90, ids)
        with handle.branching(changed, mask), pytest.warns(UserWarning, match="same prompt in rows 0:"):
            at_once(llama, ids, mask)
    empty = [regard.place("lqcd", cue=())]
    with regard.attach(llama, empty), pytest.warns(UserWarning, match="same prompt"):
        generated(llama, "greedy", tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with regard.attach(llama, CUED):
            generated(llama, "greedy", tokens=2)


def test_the_scorer_reads_a_contrast_and_says_why_a_cut_has_no_score(llama):
    held = windows(torch.randint(2, 90, (120,), generator=torch.Generator().manual_seed(0)), 40, 16, 2)
    found = [quality(llama, CUED, held, chunk).kl for chunk in (1, 5)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] > 0.01
    with pytest.raises(RegardError, match=r"infinite KL at row 0 .* as a plausibility cut"):
        quality(llama, [regard.place("lqcd", cue=CUE)], held)


def test_another_contrast_is_one_file(llama, tmp_path, monkeypatch):
    """Context-aware decoding: the branch has lost the first half of the prompt."""
    from regard import catalog

    path = tmp_path / "logits" / "cad.py"
    path.parent.mkdir()
    path.write_text(
        '"""Context-aware decoding."""\n\nfrom regard.core.card import Card, Option\n'
        "from regard.core.slots import BranchSpec, Contrast\n\n"
        'CARD = Card(\n    title="CAD", arxiv=None, sheet=None, implements="all", exact=False, saving="none",\n'
        '    whole_model=True,\n    options={"context": Option(default=8, doc="tokens it lacks")},\n)\n\n\n'
        "def contrast(where, *, context):\n"
        "    def branch(ids, mask):\n        return ids[:, context:], mask[:, context:]\n\n"
        '    return Contrast("cad", lambda z: 2 * z[0] - z[1], (BranchSpec(prompt=branch),))\n'
    )
    find, load = catalog.find, catalog.load
    monkeypatch.setattr(catalog, "find", lambda name, *_: find(name, tmp_path))
    monkeypatch.setattr(catalog, "load", lambda name: load(name, tmp_path))
    ids, mask = prompts()
    wanted = run(llama, "greedy", processor=Uncached(llama, ids[:, 8:], mask[:, 8:], 21))
    with regard.attach(llama, [regard.place("cad")]):
        assert torch.equal(run(llama, "greedy"), wanted)
        with pytest.raises(RegardError, match="decides over the whole model"):
            regard.attach(tiny("qwen2"), [regard.place("cad", layers=[1])])
    with pytest.raises(RegardError, match="'cad' and 'lqcd' each run a branch of their own"):
        regard.attach(llama, [regard.place("cad"), *CUED])
