"""The fused contrast: the sum by hand, exits by hidden states, guidance, amateurs of both kinds."""

import copy
import math

import pytest
import torch
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

import regard
from contracts.decoding import at_once, forced, prompts
from families import tiny
from regard import RegardError
from regard.ops.logits import lol

DRAWN = torch.Generator().manual_seed(0)
INSTRUCTION = (7, 33, 12)
PROMPT = 21


@pytest.fixture(scope="module")
def llama():
    return tiny("llama").double()


@pytest.fixture(scope="module")
def amateur():
    return tiny("llama", seed=5).double()


def logits(*shape):
    return torch.randn(*shape, generator=DRAWN, dtype=torch.float64)


@torch.no_grad()
def exit_logits(model, ids, mask, layer):
    """Head and norm on the stream behind `layer`, of a run without a cache."""
    seen = []
    hook = model.model.layers[layer - 1].register_forward_hook(lambda module, args, out: seen.append(out))
    at_once(model, ids, mask)
    hook.remove()
    return model.lm_head(model.model.norm(seen[0]))


def test_the_sum_is_the_definition_number_by_number():
    last, lower, bad, bad_lower, told = (logits(2, 7) for _ in range(5))
    a, omega, refocus, beta = 0.8, 0.6, 0.3, 0.2
    found = lol.fused(last, lower, bad, bad_lower, told, (a, omega, refocus), beta)
    p = {
        name: z.softmax(-1).log() for name, z in {"n": last, "l": lower, "bn": bad, "bl": bad_lower, "t": told}.items()
    }
    for row in range(2):
        for y in range(7):
            at = {name: float(x[row, y]) for name, x in p.items()}
            value = at["n"] + a * ((at["n"] - at["bn"]) + omega * (at["l"] - at["bl"])) + refocus * (at["t"] - at["n"])
            kept = math.exp(at["n"]) >= beta * float(p["n"][row].exp().max())
            assert float(found[row, y]) == pytest.approx(value) if kept else found[row, y] == -math.inf


def test_an_amateur_that_is_the_model_and_the_last_layer_as_the_lower_one():
    last, bad = logits(3, 9), logits(3, 9)
    p, q = last.log_softmax(-1), bad.log_softmax(-1)
    torch.testing.assert_close(lol.fused(last, last, last, last, last, (1.0, 0.5, 0.5), 0.0), p)
    torch.testing.assert_close(lol.fused(last, last, bad, bad, None, (1.0, 0.5, 0.0), 0.0), p + 1.5 * (p - q))


def test_without_the_lower_layer_it_is_transformers_guidance():
    z, bad = logits(2, 9), logits(2, 9)

    class Fixed:
        def __call__(self, ids, **_):
            return type("Out", (dict,), {"logits": bad[:, None]})()

    ids = torch.ones(2, 1).long()
    wanted = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, Fixed(), ids)(ids, z).log_softmax(-1)
    found = lol.fused(z, None, bad, None, None, (0.7, 0.5, 0.5), 0.0)
    torch.testing.assert_close(found.log_softmax(-1), wanted)


def told(ids, mask):
    """Prompt and what follows it, the instruction behind the first real token of each row."""
    prompt, keep = lol.instructed(ids[:, :PROMPT], mask[:, :PROMPT], INSTRUCTION, 1)
    return torch.cat((prompt, ids[:, PROMPT:]), 1), torch.cat((keep, mask[:, PROMPT:]), 1)


@pytest.mark.parametrize("cuts", [[], [5, 20, 23], list(range(21, 30))])
def test_branches_and_exits_are_runs_without_a_cache(llama, amateur, cuts):
    ids, mask = prompts(length=30)
    parts = [at_once(llama, ids, mask), exit_logits(llama, ids, mask, 2)]
    parts += [at_once(amateur, ids, mask), exit_logits(amateur, ids, mask, 2), at_once(llama, *told(ids, mask))]
    wanted = lol.fused(*(z[:, -10:] for z in parts), (1.0, 0.5, 0.5), 0.1)
    recipe = [regard.place("lol", layer=2, instruction=INSTRUCTION)]
    with regard.attach(llama, recipe) as handle, handle.prompting(PROMPT), handle.lending(amateur):
        found = forced(llama, ids, mask, cuts)
        torch.testing.assert_close(found[:, -10:], wanted)
        torch.testing.assert_close(found[:, :-10], parts[0][:, :-10])
    assert torch.equal(at_once(llama, ids, mask), parts[0])


@pytest.mark.parametrize("family", ["gemma2", "granite", "gpt2", "gpt_neox", "llava", "llama"])
def test_an_exit_at_the_last_layer_is_the_model(family):
    """Soft caps, scales and norms are the model's own: the contrast with itself is nothing."""
    model = tiny(family)
    ids, mask = prompts(length=30)
    recipe = [regard.place("lol", amateur="exit", layer=3, beta=0.0)]
    own = at_once(model, ids, mask)[:, PROMPT - 1 :].log_softmax(-1)
    with regard.attach(model, recipe) as handle, handle.prompting(PROMPT):
        torch.testing.assert_close(at_once(model, ids, mask)[:, PROMPT - 1 :], own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [1, 12, torch.tensor([3, 29, 22])])
def test_logits_to_keep_are_those_rows(llama, keep):
    ids, mask = prompts(length=30)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with regard.attach(llama, [regard.place("lol", amateur="exit", beta=0.0)]) as handle, handle.prompting(PROMPT):
        whole = at_once(llama, ids, mask)
        with torch.no_grad():
            found = llama(ids, attention_mask=mask, position_ids=place, logits_to_keep=keep).logits
    torch.testing.assert_close(found, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep])


def test_an_adapter_is_an_amateur_and_is_left_as_it_was(llama):
    peft = pytest.importorskip("peft")
    made = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    wrapped = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(**made), adapter_name="bad").double().eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    ids, mask = prompts(length=30)
    bad = at_once(wrapped, ids, mask)[:, -10:]
    recipe = [regard.place("lol", amateur="adapter", adapter="bad", omega=0.0, beta=0.0)]
    before = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    with regard.attach(wrapped, recipe) as handle, handle.prompting(PROMPT):
        with pytest.raises(RegardError, match="adapter 'bad' of 'lol' is on in the model itself"):
            at_once(wrapped, ids, mask)
        with wrapped.disable_adapter():
            found = at_once(wrapped, ids, mask)[:, -10:]
    own = at_once(llama, ids, mask)[:, -10:]
    torch.testing.assert_close(found, lol.fused(own, None, bad, None, None, (1.0, 0.0, 0.0), 0.0))
    assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == before
    torch.testing.assert_close(at_once(wrapped, ids, mask)[:, -10:], bad)


def test_planted_facts():
    """The amateur leans to a popular wrong answer, most in its lower layer: fused beats plain contrast beats none."""
    items, answers = 400, 5
    right = torch.arange(items) % answers
    popular = torch.nn.functional.one_hot((right + 1) % answers, answers)
    evidence = torch.nn.functional.one_hot(right, answers) * torch.rand(items, 1, generator=DRAWN) * 3
    model, lean = evidence + 1.5 * popular, torch.rand(items, 1, generator=DRAWN)
    bad, bad_lower = model + lean * popular, evidence + 2.5 * popular
    lower = evidence + 1.5 * popular

    def accuracy(z):
        return float((z.argmax(-1) == right).float().mean())

    plain = lol.fused(model, None, bad, None, None, (1.0, 0.0, 0.0), 0.0)
    whole = lol.fused(model, lower, bad, bad_lower, None, (1.0, 0.5, 0.0), 0.0)
    assert accuracy(model) + 0.05 < accuracy(plain)
    assert accuracy(plain) + 0.05 < accuracy(whole)


def test_what_cannot_be_an_amateur_is_refused(llama):
    ids, mask = prompts()
    other = tiny("qwen3").double()
    bad = {
        "needs an amateur: handle.lending": None,
        "of this model's layout and vocabulary": other,
        r"amateur in torch.float64 .* torch.float32": tiny("llama", seed=1),
    }
    with regard.attach(llama, [regard.place("lol")]) as handle, handle.prompting(PROMPT):
        for message, lent in bad.items():
            with handle.lending(lent), pytest.raises(RegardError, match=message):
                at_once(llama, ids, mask)
    for message, options in {
        "layer=4, and this model layers 1 to 3": {"layer": 4},
        "'layer' of 'lol' must lie in": {"layer": 0},
    }.items():
        with pytest.raises(RegardError, match=message):
            regard.attach(llama, [regard.place("lol", **options)])
    adapter = [regard.place("lol", amateur="adapter")]
    with (
        regard.attach(llama, adapter) as handle,
        handle.prompting(PROMPT),
        pytest.raises(RegardError, match="found no adapter 'default'"),
    ):
        at_once(llama, ids, mask)
    with pytest.raises(RegardError, match="lead=18, and a prompt of 17 tokens"):
        lol.instructed(ids, mask, INSTRUCTION, 18)
