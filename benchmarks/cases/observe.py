"""What seeing costs: one prefill of a model with random weights, plain and recorded, in time and in peak memory.

Sizes are those of Llama-3.2-1B. Plain is the model alone; the others read all heads: masses and sinks; these and every
head's roles on synthetic prompts; all readings and the roles. Before anything is timed, a prompt of 1,024 tokens is
recorded in float32 and compared with the weights that transformers' eager attention returns. On a CPU only with
`tiny=1`.
"""

import gc
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from regard import observe
from regard.core.errors import RegardError
from regard.core.token_map import Span, TokenMap
from regard.search import facts

SHAPES = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
MOST = 1e-4  # what a reading in float32 may differ from eager's, of its largest entry


def run(tiny: int = 0, length: int = 32_768, repeats: int = 5) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for every way to run the prompt.

    Args:
        tiny: 1: a small model and 300 tokens, to show that it runs.
        length: tokens of the prompt.
        repeats: of each, interleaved.

    Raises:
        RegardError: there is no GPU and `tiny` is 0, or a reading errs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        raise RegardError("this needs a GPU; tiny=1 runs a small model anywhere")
    name, length = ("tiny", 300) if tiny else ("1B", length)
    errors = against_eager(name, min(length, 1024), device)
    model = made(name, torch.float32 if device.type == "cpu" else torch.bfloat16, device, length)
    prompt = ids(model, length, device)
    tokens = TokenMap.of_text(torch.ones_like(prompt), [Span(0, length // 8, length // 2)])
    given = {"input_ids": prompt, "logits_to_keep": 1, "use_cache": True}
    plain = model(**given).logits[:, -1].detach()
    seen = observe.record(model, given, tokens=tokens)
    if seen.logits is None or not torch.equal(seen.logits, plain):
        raise RegardError("the recorded run gives other logits than the plain one")
    del seen
    length_of_roles, haystack = (32, 64) if tiny else (64, 256)
    asked = ("masses", "sinks")

    def roles() -> observe.Roles:
        return observe.roles(model, length=length_of_roles, haystack=haystack)

    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: model(**given),
        "masses, sinks": lambda: observe.record(model, given, tokens=tokens, readings=asked),
        "masses, sinks, roles": lambda: (observe.record(model, given, tokens=tokens, readings=asked), roles()),
        "everything": lambda: (observe.record(model, given, tokens=tokens), roles()),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for way, work in ways.items():
            seconds, peaks[way] = measured(work, device)
            times[way] += [seconds] if repeat else []
    rows = [
        {
            "model": name,
            "tokens": length,
            "run": way,
            "ms": 1e3 * statistics.median(taken),
            "/ plain": statistics.median(b / a for a, b in zip(times["plain"], taken, strict=True)),
            "peak MiB": peaks[way],
            "peak / plain": peaks[way] / peaks["plain"] if peaks["plain"] else float("nan"),
            "times": taken,
        }
        for way, taken in times.items()
    ]
    told = facts.machine(SimpleNamespace(device=device)) | {"repeats": repeats, "shape": SHAPES[name]}
    return told | {"differs from eager": errors}, rows


@torch.no_grad()
def measured(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds, and the largest MiB allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    held = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    del held
    return seconds, torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0


def made(name: str, dtype: torch.dtype, device: torch.device, length: int, attention: str = "sdpa") -> LlamaForCausalLM:
    """A model with random weights, made where it runs; scores spread as those of trained models do."""
    torch.manual_seed(0)
    shape = SHAPES[name] | {"max_position_embeddings": length, "initializer_range": 0.05}
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def ids(model: LlamaForCausalLM, length: int, device: torch.device) -> Tensor:
    """A random prompt, the same on every machine."""
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (1, length), generator=drawn).to(device)


@torch.no_grad()
def against_eager(name: str, length: int, device: torch.device) -> dict[str, float]:
    """How far each reading is from what eager's weights give, of its largest entry.

    Raises:
        RegardError: one is further than `MOST`.
    """
    model = made(name, torch.float32, device, length, "eager")
    prompt = ids(model, length, device)
    weights = torch.stack(model(prompt, output_attentions=True, use_cache=False).attentions)
    model = made(name, torch.float32, device, length)
    seen = observe.record(model, prompt, size=64)
    tile = length // 64 if length % 64 == 0 else 0
    rows = torch.arange(length, 0, -1, device=device)
    pairs = {
        "columns": (seen.columns, weights.sum(3) / rows),
        "first": (seen.masses[:, 0, :, -1, 0], weights[:, 0, :, int(seen.row_edges[-2]) :, 0].mean(-1)),
    }
    if tile:
        mean = weights.unflatten(3, (64, tile)).mean(4)
        pairs["maps"] = seen.maps, mean.unflatten(4, (64, tile)).sum(5)
        logs = -(weights * weights.clamp(min=1e-38).log()).sum(-1)
        pairs["entropy"] = seen.entropy, logs.unflatten(3, (64, tile)).mean(4)
    errors = {what: float((found - known).abs().max() / known.abs().max()) for what, (found, known) in pairs.items()}
    if max(errors.values()) > MOST:
        raise RegardError(f"readings differ from eager's: {errors}")
    return errors
