"""Whole models with random weights: tokens a second and bytes, by recipe and length, through `attach` and `generate`.

Random weights do not change what is computed: sizes are those of SmolLM2-135M and of Llama-3-8B. DuoAttention's gates
are drawn, half of the KV heads of the whole model stream. Dense is the model alone, with transformers' own cache; with
graphs it is an empty recipe. A step is timed from one token to the next, device finished; the first ones are left out.
On a CPU, where nothing is replayed, only with `tiny=1`.
"""

import gc
import time
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import regard
from regard.adapters.memory import live_bytes
from regard.core.errors import RegardError
from regard.measure.seconds import spread
from regard.recipes.recipe import Recipe, place
from regard.search import facts
from sweep import picked

SHAPES = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "Llama-3-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128,
    },
}  # fmt: skip
RECIPES = ("dense", "duo", "int4", "duo + int4")
WARM = 8  # tokens left out: buffers grow, kernels compile, a graph is recorded


class Clock(StoppingCriteria):
    """Notes the time after every token; the allocator's peak begins anew after the first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prefill = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Never stop."""
        if ids.is_cuda:
            torch.cuda.synchronize()
            if not self.times:
                self.prefill = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def run(
    tiny: int = 0,
    length: int = 0,
    new: int = 36,
    shape: int = -1,
    part: str = "",
    graphs: int = -1,
    batch: int = 1,
    chunk: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for every shape, length, recipe, and for steps replayed as graphs or not.

    Args:
        tiny: 1: the smallest shape and 300 tokens, to show that it runs.
        length: tokens of the prompt; 0: 32,768 and 131,072.
        new: tokens generated.
        shape: which of `SHAPES`; -1: the first two.
        part: which recipes, commas between them; none: all.
        graphs: 1: with graphs, 0: without, -1: both.
        batch: rows of a request.
        chunk: tokens of the prompt at a time; 0: all.

    Raises:
        RegardError: no such recipe, there is no GPU and `tiny` is 0, or fewer new tokens than are left out.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        raise RegardError("this needs a GPU; tiny=1 runs the smallest shape anywhere")
    if new < WARM + 2:
        raise RegardError(f"new must be at least {WARM + 2}, got {new}")
    asked = picked("recipe", part, RECIPES)
    names = ["tiny"] if tiny else list(SHAPES)[:2] if shape < 0 else [list(SHAPES)[shape]]
    lengths = (length or 300,) if tiny else (length,) if length else (32_768, 131_072)
    told = facts.machine(SimpleNamespace(device=device)) | {"new": new, "left out": WARM, "shapes": SHAPES}
    rows = []
    for name in names:
        model = made(name, max(lengths) + new, device)
        chosen = recipes(model, "tiny" if tiny else "")
        for tokens in lengths:
            ways = (False, True) if graphs < 0 else (bool(graphs),)
            size = {"tokens": tokens, "new": new, "batch": batch, "chunk": chunk or None}
            rows += [measured(model, name, one, chosen[one], way, **size) for one in asked for way in ways]
        del model
    for row in rows:
        same = [
            r for r in rows if (r["model"], r["tokens"], r["graphs"]) == (row["model"], row["tokens"], row["graphs"])
        ]
        dense = [r for r in same if r["recipe"] == "dense"]
        for figure in ("tokens a second", "cache MiB", "peak MiB"):
            row[f"{figure} / dense"] = row[figure] / dense[0][figure] if dense else float("nan")
    return told, rows


def made(name: str, length: int, device: torch.device) -> LlamaForCausalLM:
    """A model with random weights, made where it runs."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=length, rope_theta=500_000.0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def recipes(model: LlamaForCausalLM, small: str) -> dict[str, Recipe]:
    """What is compared."""
    config = model.config
    drawn = torch.Generator().manual_seed(0)
    gates = torch.rand(config.num_hidden_layers, config.num_key_value_heads, generator=drawn)
    sizes = {"sink": 8, "recent": 32} if small else {}
    duo, int4 = place("duo", gates=gates, sparsity=0.5, **sizes), place("saw_int4")
    return dict(zip(RECIPES, map(Recipe, ([], [duo], [int4], [duo, int4])), strict=True))


def measured(
    model: LlamaForCausalLM,
    name: str,
    label: str,
    recipe: Recipe,
    graphs: bool,
    *,
    tokens: int,
    new: int,
    batch: int,
    chunk: int | None,
) -> dict[str, Any]:
    """A row of the table, one request; `explain` says what became of its single tokens."""
    device = model.device
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=drawn).to(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock, began = Clock(), time.perf_counter()
    call = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new, "do_sample": False,
        "stopping_criteria": StoppingCriteriaList([clock]), "return_dict_in_generate": True, "pad_token_id": 0,
        "prefill_chunk_size": chunk,
    }  # fmt: skip
    if label == "dense" and not graphs:
        out, told = model.generate(ids, **call), "the model alone"
    else:
        with regard.attach(model, recipe, graphs=graphs) as handle:
            out, told = model.generate(ids, **call), handle.explain()
    held = live_bytes(out.past_key_values)
    steps = [b - a for a, b in zip(clock.times[WARM:], clock.times[WARM + 1 :], strict=False)]
    step = spread(steps)
    return {
        "model": name,
        "rows": batch,
        "tokens": tokens,
        "recipe": label,
        "graphs": graphs,
        "prefill s": clock.times[0] - began,
        "tokens a second": batch / step.median,
        "step ms": step.median * 1e3,
        "step mad": step.mad * 1e3,
        "cache MiB": held / 2**20,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan"),
        "prefill peak MiB": clock.prefill / 2**20,
        "weights MiB": sum(p.nbytes for p in model.parameters()) / 2**20,
        "explain": told.splitlines(),
        "steps": steps,
    }
