"""FFN-SkipLLM [057]: the oracles of its sheet."""

import pytest
import torch
import transformers as tf

import regard
from contracts.decoding import forced
from families import VOCABULARY
from regard.ops.depth import ffn_skip

LAYERS, PROMPT, TOTAL = 7, 6, 20
OPTIONS = {"first": 1, "last": 1, "warmup": 3, "threshold": 0.99, "jump": 2}


def deep(layers=LAYERS):
    """A random Llama of some layers in float64, whose middle blocks turn the stream a little."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.9)
    return model.eval().double()


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY - 6, (3, TOTAL), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def ran(model, ids, cuts, prompt=PROMPT, **options):
    """Logits, and for each token and layer whether its block ran: `[B, T, L]`, read off the feed-forward modules."""
    runs = torch.zeros(*ids.shape, LAYERS, dtype=torch.bool)
    start = 0

    def watch(layer):
        def hook(module, args, out):
            runs[:, start : start + out.shape[1], layer] = out.ne(0).any(-1)

        return hook

    hooks = [layer.mlp.register_forward_hook(watch(i)) for i, layer in enumerate(model.model.layers)]
    logits, cache = [], None
    with regard.attach(model, [regard.place("ffn_skip", **OPTIONS | options)]) as handle, handle.prompting(prompt):
        for stop in [*cuts, ids.shape[1]]:
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, stop
            logits.append(out.logits)
    for hook in hooks:
        hook.remove()
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [ids.shape[1]] * LAYERS
    return torch.cat(logits, 1), runs


@torch.no_grad()
def walked(model, ids, first, last, warmup, threshold, jump):
    """The definition, token by token: logits `[B, T, V]` and which blocks ran."""
    runs = torch.ones(*ids.shape, LAYERS, dtype=torch.bool)
    all_logits = []
    blocks = [block.mlp.forward for block in model.model.layers]
    for row in range(len(ids)):
        logits, cache = [], None
        for t in range(ids.shape[1]):
            state = {"left": 0, "x": None}

            def part(x, layer, state=state, t=t, row=row):
                skippable = first <= layer < LAYERS - last and t >= PROMPT + warmup
                if skippable and state["left"]:
                    state["left"] -= 1
                    runs[row, t, layer] = False
                    return torch.zeros_like(x)
                out = blocks[layer](x)
                if skippable and ffn_skip.saturation(state["x"], state["x"] + out) >= threshold:
                    state["left"] = jump
                return out

            hooks = []
            for layer, block in enumerate(model.model.layers):
                # What enters the second norm is the stream before the block.
                norm = block.post_attention_layernorm
                hooks.append(norm.register_forward_pre_hook(lambda m, a, state=state: state.update(x=a[0])))
                block.mlp.forward = lambda x, layer=layer, part=part: part(x, layer)
            out = model(ids[row : row + 1, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
            for hook in hooks:
                hook.remove()
        all_logits.append(torch.cat(logits, 1))
    return torch.cat(all_logits), runs


CUTS = {
    "at once": [],
    "token by token": list(range(PROMPT, TOTAL)),
    "chunks": [3, 8, 11, 16],
}


@pytest.mark.parametrize(("threshold", "jump"), [(0.99, 1), (0.975, 2), (0.99, 4)])
def test_blocks_are_those_of_the_greedy_walk(ids, threshold, jump):
    options = OPTIONS | {"jump": jump, "threshold": threshold}
    want, blocks = walked(deep(), ids, **options)
    assert 0.02 < float((~blocks[:, PROMPT + 3 :]).double().mean()) < 0.5
    assert not torch.equal(blocks[0], blocks[1])
    for cuts in ([], list(range(PROMPT, TOTAL)), [3, 8, 11, 16]):
        found, runs = ran(deep(), ids, cuts, **options)
        assert torch.equal(runs, blocks)
        torch.testing.assert_close(found, want)


def test_a_threshold_above_1_is_the_model_itself(ids):
    model = deep()
    found, runs = ran(model, ids, [PROMPT], threshold=1.5)
    assert bool(runs.all())
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits)


def test_always_saturated_with_the_longest_jump_runs_the_first_middle_block_only(ids):
    found, runs = ran(deep(), ids, [PROMPT], threshold=-1.0, jump=LAYERS, warmup=0)
    ends = torch.ones(LAYERS, dtype=torch.bool)
    ends[2:-1] = False
    assert bool(runs[:, :PROMPT].all())
    assert bool((runs[:, PROMPT:] == ends).all())
    built = deep()
    rows = torch.arange(TOTAL)[:, None] < PROMPT
    for layer in built.model.layers[2:-1]:
        whole = layer.mlp.forward
        layer.mlp.forward = lambda x, whole=whole: torch.where(rows, whole(x), 0)
    with torch.no_grad():
        torch.testing.assert_close(found, built(ids).logits)


def test_prompt_and_warm_up_run_everything_and_so_does_a_prompt_without_end(ids):
    _, runs = ran(deep(), ids, [3, 9, 12], threshold=-1.0, warmup=5)
    assert bool(runs[:, : PROMPT + 5].all())
    assert not bool(runs[:, PROMPT + 5 :].all(-1).any())
    model = deep()
    with torch.no_grad():
        want = model(ids).logits
        with regard.attach(model, [regard.place("ffn_skip", **OPTIONS | {"threshold": -1.0})]):
            torch.testing.assert_close(model(ids).logits, want)


def test_a_skipped_block_is_not_run(ids):
    """No product of a skipped block is computed: its inner projection sees only the rows that run."""
    model, rows = deep(), []
    model.model.layers[3].mlp.down_proj.register_forward_hook(lambda m, a, out: rows.append(out.shape[:-1].numel()))
    ran(model, ids, list(range(PROMPT, TOTAL)), threshold=-1.0, jump=LAYERS, warmup=2)
    assert sum(rows) == 3 * (PROMPT + 2)


def test_padded_rows_decide_as_they_do_alone(ids):
    model, mask = deep(), torch.ones_like(ids)
    mask[0, :4] = 0
    with regard.attach(model, [regard.place("ffn_skip", **OPTIONS)]) as handle:
        with handle.prompting(PROMPT):
            both = forced(model, ids, mask, [PROMPT, 13])
        with handle.prompting(PROMPT - 4):
            alone = forced(model, ids[:1, 4:], mask[:1, 4:], [PROMPT - 4, 9])
    torch.testing.assert_close(both[:1, 4:], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 4, "last": 4}, r"first 4 and the last 4 layers, and this model has 7; choose first \+ last <= 7"),
        ({"jump": 0}, "jump"),
        ({"warmup": -1}, "warmup"),
        ({"threshold": float("nan")}, "threshold"),
        ({"layers": [2]}, "whole model; drop layers"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(regard.RegardError, match=message):
        regard.attach(deep(), [regard.place("ffn_skip", **OPTIONS | change)])
