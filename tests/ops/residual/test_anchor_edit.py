"""Edits by anchors: hooks that add a vector, what must stay, a toy read-out, and a vision-language model."""

import pytest
import torch

import regard
import vlms
from contracts.decoding import at_once, forced, prompts
from families import tiny
from regard import RegardError
from regard.ops.residual import anchor_edit

DRAWN = torch.Generator().manual_seed(0)
PROMPT = 21


def drawn(*shape):
    return torch.randn(*shape, generator=DRAWN, dtype=torch.float64)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama").double()


def test_it_is_a_hook_that_adds_a_vector(llama):
    (ids, mask), layer = prompts(length=30), 1
    ends = {"positive": drawn(32), "negative": drawn(32)}
    seen = []

    def add(module, args, out):
        vector = 0.3 * ends["positive"] / ends["positive"].norm() - 0.2 * ends["negative"] / ends["negative"].norm()
        seen.append(out[:, PROMPT - 1 :] + out[:, PROMPT - 1 :].norm(dim=-1, keepdim=True) * vector)
        return torch.cat((out[:, : PROMPT - 1], seen[-1]), 1)

    hook = llama.model.layers[layer].register_forward_hook(add)
    wanted = at_once(llama, ids, mask)
    hook.remove()
    recipe = [regard.place("anchor_edit", layers=layer, alpha=0.3, beta=0.2, restore=False, **ends)]
    with regard.attach(llama, recipe) as handle, handle.prompting(PROMPT):
        torch.testing.assert_close(forced(llama, ids, mask, [5, 20, 23]), wanted)


def test_linear_before_norms_are_restored_and_norms_stay_after():
    x, positive, negative = drawn(2, 3, 16), drawn(16), drawn(16)

    def moved(alpha, beta, restore=False):
        return anchor_edit.edited(x, positive, negative, alpha, beta, restore) - x

    torch.testing.assert_close(moved(0.4, 0.6), 2 * moved(0.2, 0.0) + 3 * moved(0.0, 0.2))
    torch.testing.assert_close((x + moved(0.4, 0.6, True)).norm(dim=-1), x.norm(dim=-1))


def test_every_row_has_its_own_anchor(llama):
    (ids, mask), ends = prompts(length=30), {"positive": drawn(2, 32), "negative": drawn(2, 32)}

    def steered(rows, anchors):
        recipe = [regard.place("anchor_edit", layers=1, **anchors)]
        with regard.attach(llama, recipe) as handle, handle.prompting(PROMPT):
            return at_once(llama, ids[rows], mask[rows])

    together = steered([0, 1], ends)
    for row in (0, 1):
        alone = steered([row], {name: end[row] for name, end in ends.items()})
        torch.testing.assert_close(together[row : row + 1], alone)
    with pytest.raises(RegardError, match="anchors for 2 rows, and the request has 1"):
        steered([0], ends)


def test_equal_anchors_change_no_bit():
    x, same = drawn(2, 3, 16).float(), drawn(16)
    assert torch.equal(anchor_edit.edited(x, same, same, 0.3, 0.3, True), x)
    assert torch.equal(anchor_edit.edited(x.bfloat16(), same, same, 0.3, 0.3, True), x.bfloat16())


def test_concepts_of_one_image_each():
    """Read-out directions are axes: A is in the image alone, B in the drawn one, C in neither."""
    x, (a, b, c) = drawn(16), torch.eye(16, dtype=torch.float64)[:3]
    rising = [anchor_edit.edited(x, a, b, alpha, 0.1, False) for alpha in (0.0, 0.1, 0.2, 0.4)]
    assert [float(h @ a) for h in rising] == sorted(float(h @ a) for h in rising)
    falling = [anchor_edit.edited(x, a, b, 0.1, beta, False) for beta in (0.0, 0.1, 0.2, 0.4)]
    assert [float(h @ b) for h in falling] == sorted((float(h @ b) for h in falling), reverse=True)
    assert all(float(h @ c) == float(x @ c) for h in (*rising, *falling))


def test_anchors_of_two_images_steer_a_vision_language_model():
    model, given = vlms.tiny("llava")
    with torch.no_grad():
        features = model.get_image_features(pixel_values=given["pixel_values"], return_dict=True).pooler_output
    ends = [anchor_edit.anchor(image) for image in features[:2]]
    said = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    own = torch.stack(model.generate(**given, **said).logits)
    for negative, same in ((ends[0], True), (ends[1], False)):
        with regard.attach(model, [regard.place("anchor_edit", layers=1, positive=ends[0], negative=negative)]):
            found = torch.stack(model.generate(**given, **said).logits)
        assert torch.equal(found, own) == same


def test_missing_and_odd_anchors_are_named(llama):
    bad = {
        "no negative anchor: caption the image, draw one": {"positive": torch.ones(32)},
        "no positive anchor": {"negative": torch.ones(32)},
        r"negative anchor of shape \[8\]; this model's stream is \[32\]": {"beta": 0.1, "negative": torch.ones(8)},
        "positive anchor that is not finite": {"beta": 0.0, "positive": torch.full((32,), torch.nan)},
    }
    for message, options in bad.items():
        options = {"alpha": 0.0} | options if "\\[8" in message else options
        with pytest.raises(RegardError, match=message):
            regard.attach(llama, [regard.place("anchor_edit", **options)])
