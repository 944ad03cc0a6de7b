"""Running the command line inside the test process, on a model that takes no time."""

import sys
from dataclasses import dataclass

# What makes a search end in seconds; everything else is as a user runs it.
QUICK_SEARCH = (
    "--trials 3 --set context=96 --set continuation=16 --set windows=1 --set final_length=160 --set final_windows=1 "
    "--set final_members=1 --set repeats=1 --set final_repeats=1 --set steps=4 --set facts=1 --mechanism saw_int4"
).split()
QUICK_TRAIN = "--width 16 --heads 1 --length 64 --batch 2 --steps 4".split()
QUICK_MEASURE = "--context 96 --continuation 16 --windows 1 --repeats 1 --facts 1".split()


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit status."""

    code: int
    out: str
    err: str


def runner(monkeypatch, capfd):
    """A function that runs `regard WORDS...` and returns `Done`."""
    from regard.cli.app import run

    def regard(*words):
        monkeypatch.setattr(sys, "argv", ["regard", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            run()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return regard


def tiny_model(folder, tokenizer):
    """Save a random two-layer Llama with the tokenizer of the demo model; heads wide enough to pay for scales."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
