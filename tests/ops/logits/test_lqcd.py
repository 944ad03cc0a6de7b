"""Contrast of a neutral and a leading prompt against transformers' guidance, two plain runs, and a toy that flips."""

import math

import pytest
import torch
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

import regard
from contracts.decoding import at_once, forced, prompts
from families import VOCABULARY, tiny
from regard import RegardError
from regard.core.placement import Where
from regard.ops.logits import lqcd

WHERE = Where(layer=0, layers=1, heads=4, kv_heads=2, head_dim=8)
CUE = (5, 17, 40)
DRAWN = torch.Generator().manual_seed(0)


def logits(*shape):
    return torch.randn(*shape, generator=DRAWN, dtype=torch.float64)


def test_the_combination_is_the_paper_s_number_by_number():
    neutral, leading = logits(2, 3, 7), logits(2, 3, 7)
    alpha, beta = 0.7, 0.3
    found = lqcd.combined(neutral, leading, alpha, beta)
    for row in range(2):
        for step in range(3):
            probabilities = neutral[row, step].softmax(-1)
            for token in range(7):
                value = (1 + alpha) * neutral[row, step, token] - alpha * leading[row, step, token]
                kept = probabilities[token] >= beta * probabilities.max()
                assert found[row, step, token] == (value if kept else -math.inf)


def test_the_cut_keeps_the_likeliest_token_and_all_at_beta_zero():
    neutral, leading = logits(5, 9), logits(5, 9)
    strictest = lqcd.combined(neutral, leading, 1.0, 1.0)
    assert torch.equal(strictest.isfinite().sum(-1), torch.ones(5, dtype=torch.long))
    assert torch.equal(strictest.argmax(-1), neutral.argmax(-1))
    assert lqcd.combined(neutral, leading, 1.0, 0.0).isfinite().all()


def test_equal_prompts_leave_the_distribution_before_the_cut():
    z = logits(4, 11)
    torch.testing.assert_close(lqcd.combined(z, z, 3.0, 0.0), z)


def test_sixteen_bit_logits_are_combined_in_float32():
    neutral, leading = logits(4, 50).bfloat16(), logits(4, 50).bfloat16()
    exact = lqcd.combined(neutral.double(), leading.double(), 1.5, 0.0)
    assert torch.equal(lqcd.combined(neutral, leading, 1.5, 0.0), exact.bfloat16())


def test_given_names_the_prompt_that_the_model_reads():
    main, other = logits(1, 2, 6), logits(1, 2, 6)
    plain = {"alpha": 1.0, "beta": 0.1, "cue": CUE, "tail": 0}
    neutral = lqcd.contrast(WHERE, given="neutral", **plain)
    leading = lqcd.contrast(WHERE, given="leading", **plain)
    assert torch.equal(neutral.combine([main, other]), lqcd.combined(main, other, 1.0, 0.1))
    assert torch.equal(leading.combine([main, other]), lqcd.combined(other, main, 1.0, 0.1))


def test_alpha_zero_is_neutral():
    assert lqcd.contrast(WHERE, alpha=0.0, beta=0.1, cue=CUE, tail=0, given="neutral") is None


def rows(ids, mask):
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("tail", [0, 3, 17])
def test_a_cue_is_inserted_before_the_tail_of_every_row(tail):
    ids, mask = prompts()
    plain = rows(ids, mask)
    wanted = [row[: len(row) - tail] + list(CUE) + row[len(row) - tail :] for row in plain]
    assert rows(*lqcd.insert(ids, mask, CUE, tail)) == wanted


def test_a_tail_longer_than_a_prompt_names_both():
    with pytest.raises(RegardError, match=r"tail=18, and a prompt of 17 tokens"):
        lqcd.insert(*prompts(), CUE, 18)


@pytest.mark.parametrize("tail", [0, 2])
def test_removing_undoes_inserting(tail):
    ids, mask = prompts()
    assert rows(*lqcd.remove(*lqcd.insert(ids, mask, CUE, tail), CUE)) == rows(ids, mask)


def test_only_the_last_cue_goes_and_rows_without_one_stay():
    ids = torch.tensor([[5, 5, 17, 40, 9, 5, 17, 40, 5, 17], [0, 0, 5, 17, 41, 3, 3, 3, 3, 3], [5, 17, 40] + [1] * 7])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :2] = 0
    found = rows(*lqcd.remove(ids, mask, CUE))
    assert found == [[5, 5, 17, 40, 9, 5, 17], [5, 17, 41, 3, 3, 3, 3, 3], [40] + [1] * 7]
    assert rows(*lqcd.remove(ids, mask, ())) == rows(ids, mask)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_log_probabilities_are_those_of_transformers_guidance(alpha):
    """Unpadded: the guidance processor gives its branch no positions, so padding would move it."""
    model = tiny("llama").double()
    ids, mask = prompts(padding=0)
    leading, leading_mask = lqcd.insert(ids, mask, CUE, 2)
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1 + alpha, model, leading, leading_mask)
    with torch.no_grad():
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    wanted = []
    for stop in range(ids.shape[1], tokens.shape[1] + 1):
        scores = at_once(model, tokens[:, :stop], torch.ones_like(tokens[:, :stop]))[:, -1]
        with torch.no_grad():
            wanted.append(guidance(tokens[:, :stop], scores).log_softmax(-1))
    recipe = [regard.place("lqcd", alpha=alpha, beta=0.0, cue=CUE, tail=2)]
    with regard.attach(model, recipe) as handle, handle.prompting(ids.shape[1]):
        found = forced(model, tokens, torch.ones_like(tokens), list(range(ids.shape[1], tokens.shape[1])))
    torch.testing.assert_close(found[:, ids.shape[1] - 1 :].log_softmax(-1), torch.stack(wanted, 1))


@pytest.mark.parametrize("given", ["neutral", "leading"])
def test_padded_prompts_of_different_length_are_two_runs_without_a_cache(given):
    model = tiny("llama").double()
    neutral = prompts(length=30)
    leading = lqcd.insert(neutral[0][:, :21], neutral[1][:, :21], CUE, 4)
    after = (neutral[0][:, 21:], neutral[1][:, 21:])
    leading = tuple(torch.cat(pair, 1) for pair in zip(leading, after, strict=True))
    main = neutral if given == "neutral" else leading
    wanted = lqcd.combined(at_once(model, *neutral)[:, -10:], at_once(model, *leading)[:, -10:], 1.0, 0.1)
    prompt = main[0].shape[1] - 9
    recipe = [regard.place("lqcd", cue=CUE, tail=4, given=given)]
    with regard.attach(model, recipe) as handle, handle.prompting(prompt):
        found = forced(model, *main, [7, prompt, prompt + 1, prompt + 5])
    torch.testing.assert_close(found[:, -10:], wanted)
    torch.testing.assert_close(found[:, :-10], at_once(model, *main)[:, :-10])
    assert wanted.isinf().any()


class Toy:
    """Items with an evidence for their right answer, and cues that lend another answer `weight`."""

    def __init__(self, items=40, answers=4, weight=3.0):
        self.right = torch.arange(items) % answers
        self.evidence = torch.rand(items, generator=DRAWN) * 2.5 + 0.1
        self.suggested = (self.right + 1) % answers
        self.answers, self.weight = answers, weight

    def logits(self, cued):
        eye = torch.eye(self.answers)
        return self.evidence[:, None] * eye[self.right] + (self.weight * eye[self.suggested] if cued else 0)

    def flips(self, neutral, alpha):
        """Flip rate against neutral when a share `neutral` of the cue is left in the neutral prompt."""
        z = self.logits(False) + neutral * self.weight * torch.eye(self.answers)[self.suggested]
        return float((lqcd.combined(z, self.logits(True), alpha, 0.0).argmax(-1) != self.right).float().mean())


def test_flips_end_where_alpha_passes_its_threshold():
    """With half the cue left, `evidence > weight (1/2 - alpha/2)` decides: none flip from `1 - 2 e / w` on."""
    toy = Toy()
    assert float((toy.logits(True).argmax(-1) != toy.right).float().mean()) == 1.0
    thresholds = 1 - 2 * toy.evidence / toy.weight
    for alpha in (0.0, 0.2, 0.5, 0.8):
        assert toy.flips(0.5, alpha) == pytest.approx(float((alpha < thresholds).float().mean()))
    assert toy.flips(0.5, 0.0) > 0.3
    assert toy.flips(0.5, float(thresholds.max()) + 1e-3) == 0.0
    # A prompt that is neutral already keeps its accuracy at any strength.
    assert all(toy.flips(0.0, alpha) == 0.0 for alpha in (0.5, 1.0, 5.0))


BAD = {
    "negative alpha": ({"alpha": -0.5}, r"'alpha' of 'lqcd' must lie in \[0"),
    "no number": ({"alpha": math.nan}, r"'alpha' of 'lqcd' must lie in"),
    "beta above one": ({"beta": 1.5}, r"'beta' of 'lqcd' must lie in \[0.0, 1.0\], got 1.5"),
    "text": ({"cue": "I think so"}, "'cue' of 'lqcd' must be a list of token ids"),
    "fractions": ({"cue": torch.tensor([1.5])}, "'cue' of 'lqcd' must be a list of token ids"),
    "two rows": ({"cue": torch.ones(2, 3, dtype=torch.long)}, "'cue' of 'lqcd' must be a list of token ids"),
    "below zero": ({"cue": [4, -1]}, "whole numbers from 0 up"),
    "given": ({"given": "leeding"}, "must be one of 'neutral', 'leading'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    options, message = BAD[name]
    with pytest.raises(RegardError, match=message):
        regard.place("lqcd", **options)


def test_a_cue_is_the_same_as_a_list_a_tuple_and_a_tensor_and_must_be_known_to_the_model():
    placed = [regard.place("lqcd", cue=cue) for cue in (list(CUE), CUE, torch.tensor(CUE))]
    assert placed[0] == placed[1] == placed[2]
    with pytest.raises(RegardError, match=f"'cue' of 'lqcd' has token {VOCABULARY}; this model knows ids 0 to 95"):
        regard.attach(tiny("llama"), [regard.place("lqcd", cue=[3, VOCABULARY])])


def test_a_cue_is_saved_as_plain_numbers(tmp_path):
    recipe = regard.Recipe([regard.place("lqcd", cue=torch.tensor(CUE), tail=2)])
    path = recipe.save(tmp_path / "recipe.yaml")
    assert "cue: [5, 17, 40]" in path.read_text()
    assert not path.with_suffix(".safetensors").exists()
    again = regard.Recipe.load(path)
    assert again.digest == recipe.digest
    assert again.placements == recipe.placements
