"""Fine-tuning for skipped depth: what it trains, on what, and that it is the paper's schedule."""

import pytest
import torch

import regard
from contracts.snapshot import snapshot
from families import VOCABULARY, tiny
from regard.calibrate.unified_skip import WARM_UP, finetune, response_loss, schedule

HOW = {"speed_up": 1.5, "steps": 6, "batch": 2, "length": 24, "rate": 1e-3}


def text(n: int = 300) -> torch.Tensor:
    return torch.randint(2, VOCABULARY - 6, (n,), generator=torch.Generator().manual_seed(3))


def test_weights_change_in_place_and_nothing_else():
    model = tiny("qwen2").train()
    model.lm_head.weight.requires_grad_(False)
    before, weights = snapshot(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    told = []
    losses = finetune(model, text(), progress=lambda *done: told.append(done), **HOW)
    assert len(losses) == 6
    assert told == [(step, 6) for step in range(1, 7)]
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) == (name == "model.embed_tokens.weight"), name
    now = snapshot(model)
    assert {k: v for k, v in now.items() if "weight " not in k} == {
        k: v for k, v in before.items() if "weight " not in k
    }


def test_the_same_seed_gives_the_same_weights():
    first, second = tiny("llama"), tiny("llama")
    assert finetune(first, text(), distil=0.5, **HOW) == finetune(second, text(), distil=0.5, **HOW)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_distillation_alone_approaches_full_depth():
    model = tiny("llama")
    held = text()[:24][None]

    def away():
        handle = regard.attach(model, [regard.place("unified_skip", speed_up=1.5)])
        with torch.no_grad(), handle, handle.prompting(8):
            return float(response_loss(model, held, 8, tiny("llama"), 1.0))

    before = away()
    finetune(model, held, prompt=8, distil=1.0, **HOW | {"steps": 40})
    assert away() < 0.5 * before


def test_full_depth_is_the_models_own_loss_on_response_tokens():
    model, ids = tiny("llama"), text()[:40].view(2, 20)
    labels = ids.clone()
    labels[:, :7] = -100
    with torch.no_grad():
        torch.testing.assert_close(response_loss(model, ids, 7), model(ids, labels=labels).loss)
        assert float(response_loss(model, ids, 7, model, 1.0)) == pytest.approx(0, abs=1e-6)


def test_the_rate_rises_over_3_per_cent_and_falls_to_0_along_a_cosine():
    assert schedule(0.0) == pytest.approx(0.1)
    assert schedule(WARM_UP / 2) == pytest.approx(0.5)
    assert schedule(WARM_UP) == pytest.approx(1)
    assert schedule((1 + WARM_UP) / 2) == pytest.approx(0.5)
    assert schedule(1.0) == pytest.approx(0)


def test_time_ends_it_early():
    assert len(finetune(tiny("llama"), text(), seconds=1e-6, **HOW)) == 1


def test_autocast_runs_attached_layers_in_the_low_dtype_and_close_to_it():
    model, ids = tiny("llama"), text()[:24][None]
    with regard.attach(model, [regard.place("unified_skip", speed_up=1.5)]) as handle, handle.prompting(12):
        want = response_loss(model, ids, 12)
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(ids).past_key_values
            found = response_loss(model, ids, 12)
        found.backward()
    assert cache.layers[1].store.buffer.fields[0].dtype == torch.bfloat16
    assert found.item() == pytest.approx(want.item(), rel=0.1)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": text(20)}, "needs a text as long, got 20 tokens"),
        ({"tokens": text()[:4].float()}, "whole numbers"),
        ({"prompt": 24}, "1 <= prompt < 24, got prompt=24"),
        ({"distil": 1.5}, r"0 to 1, got 1\.5"),
        ({"steps": 0}, "steps above 0"),
        ({"rate": float("nan")}, "rate above 0"),
        ({"speed_up": 3.0}, "keeps 1 of 3 layers"),
        ({"rate": 1e9, "steps": 30}, "choose a lower rate"),
    ],
)
def test_what_cannot_be_trained_is_named(change, message):
    with pytest.raises(regard.RegardError, match=message):
        finetune(tiny("llama"), **{"tokens": text(), **HOW, **change})
    with pytest.raises(regard.RegardError, match=r"needs float32 weights .* torch\.bfloat16"):
        finetune(tiny("llama").bfloat16(), text(), **HOW)
