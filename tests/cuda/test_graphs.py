"""Steps of training and of decoding replayed as CUDA graphs against the same steps launched one by one."""

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.adapters import graphs
from regard.core.errors import RegardError
from regard.kernels.graphs import Replay
from regard.layers import mixers
from regard.models.hybrid import HybridConfig, HybridForCausalLM
from regard.train.data import Batch, open_source
from regard.train.loop import train
from regard.train.settings import Settings
from train.toys import same, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def settings(**changes):
    words = {
        "task": "mqar", "task_settings": {"pairs": 8, "vocabulary": 256}, "length": 128, "batch": 8, "steps": 20,
        "evaluate": 4, "held_out": 32, "bf16": True, "rate": 3e-3, "warmup": 0.1,
    }  # fmt: skip
    return Settings(**(words | changes))


def model(mixer, **changes):
    torch.manual_seed(3)
    words = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 1, "mlp": "none", "embedding_dropout": 0.1}
    return HybridForCausalLM(HybridConfig(mixers=[mixer, mixer], **(words | changes))).cuda()


def run(mixer, wanted, source=None, made=None, **options):
    made = model(mixer) if made is None else made
    torch.manual_seed(wanted.seed)
    source = open_source(wanted, "cuda") if source is None else source
    return made, train(made, source, wanted, **options)


def after(steps):
    asked = iter(range(1, 1000))
    return lambda: next(asked) == steps


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("mixer", mixers.names())
def test_replayed_steps_are_the_steps(mixer, bf16):
    """Dropout is on, so that random numbers count too."""
    eager, told = run(mixer, settings(graphs=False, bf16=bf16))
    drawn = torch.cuda.get_rng_state()
    assert not same(eager, model(mixer))
    _, again = run(mixer, settings(graphs=False, bf16=bf16))
    replayed, found = run(mixer, settings(graphs=True, bf16=bf16))
    assert told.eager == "graphs are off"
    assert found.eager == ""
    # Kernels that add in any order differ from one run to the next; replaying may add no more than that.
    noise = max(abs(a - b) for a, b in zip(told.losses, again.losses, strict=True))
    apart = max(abs(a - b) for a, b in zip(told.losses, found.losses, strict=True))
    print(f"\n{mixer} bf16={bf16}: apart {apart:.2e}, eager from itself {noise:.2e}")
    assert apart <= 4 * noise + 1e-3
    for one, other in zip(told.measured, found.measured, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=4 * noise + 1e-3)
    assert torch.equal(drawn, torch.cuda.get_rng_state())
    if noise == 0:
        assert same(eager, replayed)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_run_goes_on_from_a_checkpoint_that_replays_wrote(tmp_path, graphs):
    wanted = settings(graphs=True, checkpoint=5)
    whole, told = run("retnet", wanted)
    run("retnet", wanted, out=tmp_path, asked=after(9))
    torch.manual_seed(99)
    second = settings(graphs=graphs, checkpoint=5)
    other, found = run("retnet", second, made=model("retnet"), out=tmp_path, resume=True)
    assert found.losses == pytest.approx(told.losses, abs=1e-3)
    assert len(found.losses) == 20
    assert all(torch.allclose(x, weights(other)[name], atol=1e-3) for name, x in weights(whole).items())


def test_parts_of_a_batch_are_captured_together():
    _, told = run("retnet", settings(graphs=False, accumulate=2))
    _, found = run("retnet", settings(graphs=True, accumulate=2))
    assert found.losses == pytest.approx(told.losses, abs=1e-3)


def test_a_text_is_captured_too(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} is {i * i} when squared. " for i in range(400)))
    words = {"text": str(path), "task": "", "task_settings": {}, "held_out": 3}
    _, told = run("delta_net", settings(graphs=False, **words))
    _, found = run("delta_net", settings(graphs=True, **words))
    assert found.losses == pytest.approx(told.losses, abs=2e-3)


def test_waiting_for_the_device_is_found_and_refused():
    class Waits(torch.nn.Module):
        def forward(self, x):
            return x * 1.0 if float(x.sum()) else x

    def waiting():
        made = model("retnet")
        made.model.norm = torch.nn.Sequential(made.model.norm, Waits())
        return made

    with pytest.raises(RegardError, match=r"graphs=True refuses: line \d+ of .*test_graphs.py waits for the device"):
        run("retnet", settings(graphs=True), made=waiting())
    _, told = run("retnet", settings(graphs=False), made=waiting())
    _, found = run("retnet", settings(), made=waiting())
    assert "waits for the device" in found.eager
    assert found.losses == pytest.approx(told.losses, abs=1e-3)
    assert torch.cuda.get_sync_debug_mode() == 0


def test_rows_of_another_shape_are_launched_or_refused():
    wanted = settings(graphs=True)
    source = open_source(wanted, "cuda")
    batch = source.batch
    source.batch = lambda step: batch(step) if step != 9 else Batch(*(x[:4] for x in batch(step).tensors))
    with pytest.raises(
        RegardError, match=r"graphs=True refuses: rows of \[\[4, 128\].* came after rows of \[\[8, 128\]"
    ):
        run("retnet", wanted, source)
    _, told = run("retnet", settings(graphs=False), source)
    _, found = run("retnet", settings(), source)
    assert "came after" in found.eager
    assert found.losses == pytest.approx(told.losses, abs=1e-3)


DUO = regard.place("duo", gates=torch.tensor([[0.9, 0.1], [0.2, 0.8]]), sparsity=0.5, sink=4, recent=40)
CODES = regard.place("saw_int4")
RECIPES = {
    "dense": [], "duo": [DUO], "codes": [CODES], "duo in codes": [DUO, CODES],
    "ring": [regard.place("streaming", sink=3, window=50)],
}  # fmt: skip


def answers(llama, recipe, **options):
    ids = torch.randint(1, 256, (2, 120), generator=torch.Generator().manual_seed(4)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    call = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with regard.attach(llama, recipe, **options) as handle:
        out = llama.generate(ids, attention_mask=mask, **call)
        return torch.stack(out.logits, 1), out.sequences, handle.explain()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_answers_are_the_answers(monkeypatch, recipe, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).to("cuda", dtype).eval()
    eager, tokens, _ = answers(llama, RECIPES[recipe])
    answers(llama, RECIPES[recipe], graphs=True)  # what cuBLAS keeps for a stream stays
    gc.collect()
    before = torch.cuda.memory_allocated()
    found, mine, told = answers(llama, RECIPES[recipe], graphs=True)
    assert "replayed as a CUDA graph; begun 1 times" in told
    monkeypatch.setattr(graphs, "Replay", lambda work, device, wanted: Replay(work, device, False))
    launched, same_tokens, told = answers(llama, RECIPES[recipe], graphs=True)
    assert "launched every time (graphs are off)" in told
    assert torch.equal(found, launched)
    assert torch.equal(mine, same_tokens)
    if dtype == torch.float32:
        assert torch.equal(mine, tokens)
        assert torch.allclose(found, eager, atol=1e-4)
    del found, launched, mine, same_tokens
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**20
