"""MergeLock [027] on two siblings of one base: merged plain, merged with one locked, merged after the attack.

The base half learns to write a short word backwards and to write it turned by one place; each sibling goes on with
mostly one of the two tasks. A merge is the plain average of all weights. The attack needs any relative of the locked
model.
"""

from copy import deepcopy
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.adapters import projections
from regard.adapters.families import open_decoder
from regard.core.projections import Projections
from regard.measure.seconds import spread
from regard.ops.parameters import mergelock
from regard.search import facts

SYMBOLS, LENGTH = 16, 5
TASKS = ("reverse", "rotate")
# Shares of a batch, as indices into TASKS. The base sees more of the harder task. Each sibling still sees a quarter of
# the other's: one that never does unlearns what the marks say, and then even plain siblings average badly.
BASE, SIBLINGS, BOTH = (0, 0, 0, 1), ((0, 0, 0, 1), (1, 1, 1, 0)), (0, 1)
LEARN, TUNE = 5e-3, 1e-3  # peak rates from random weights and from a model that was trained


def run(seeds: int = 5, learn: int = 70, tune: int = 160, repair: int = 40) -> tuple[dict[str, Any], list[dict]]:
    """Accuracies of every scene over `seeds`; `learn`, `tune` and `repair` are training steps."""
    found: dict[str, list[dict[str, float]]] = {}
    moved, tuned = 0.0, 0.0
    for seed in range(seeds):
        base, *siblings = family(seed, learn, tune)
        shown = scenes(base, *siblings)
        shown |= repaired(shown, seed, repair)
        for what, model in shown.items():
            found.setdefault(what, []).append(accuracy(model))
        word = sample(0, 64, torch.Generator().manual_seed(seed))
        moved = max(moved, *((logits(locked(own, 1), word) - logits(own, word)).abs().max().item() for own in siblings))
        tuned = max(tuned, *(distance(own, base) for own in siblings))
    told = facts.machine(base) | {
        "model": facts.model_facts(base),
        "settings": {"seeds": seeds, "learn": learn, "tune": tune, "repair": repair},
        "siblings": {"A": "tuned on three parts reverse, one rotate", "B": "tuned on three parts rotate, one reverse"},
        "accuracy": "of single symbols, every earlier symbol of the answer given; median, lowest and highest seed",
        "chance": {"any symbol": 1 / SYMBOLS, "any symbol of the word": (1 + (LENGTH - 1) / SYMBOLS) / LENGTH},
        "largest change of a logit by locking": moved,
        "largest change of the weights by tuning, of their norm": tuned,
    }
    return told, [row(what, by_seed) for what, by_seed in found.items()]


def row(what: str, by_seed: list[dict[str, float]]) -> dict[str, Any]:
    """Median and range over seeds, a task, and everything they come from."""
    made: dict[str, Any] = {"what": what}
    for task in TASKS:
        over = spread([one[task] for one in by_seed])
        made |= {task: over.median, f"{task} low": over.low, f"{task} high": over.high}
    return made | {"seeds": by_seed}


def family(seed: int, learn: int, tune: int) -> tuple[Any, Any, Any]:
    """A base that was trained on both tasks, and its two siblings, each tuned on mostly one of them."""
    base = trained(fresh(seed), BASE, learn, LEARN, seed)
    first, second = (trained(base, tasks, tune, TUNE, 100 * (i + 1) + seed) for i, tasks in enumerate(SIBLINGS))
    return base, first, second


def scenes(base: Any, first: Any, second: Any) -> dict[str, Any]:
    """Every model that is compared, by what it is."""
    first_locked, second_locked = locked(first, 1), locked(second, 2)
    return {
        "base": base,
        "A": first,
        "B": second,
        "A locked": first_locked,
        "B locked": second_locked,
        "A + B": average(first, second),
        "A + B locked": average(first, second_locked),
        "A locked + B": average(first_locked, second),
        "both locked, two seeds": average(first_locked, second_locked),
        "both locked, one seed": average(locked(first, 2), second_locked),
        "A + B locked, aligned to base": average(first, aligned(second_locked, base)),
        "A + B locked, aligned to A": average(first, aligned(second_locked, first)),
    }


def repaired(shown: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Merges tuned on both tasks, and what as many steps make of random weights."""
    merges = {what: shown[what] for what in ("A + B", "A + B locked")}
    return {
        f"{what}, {steps} steps of training": trained(model, BOTH, steps, LEARN, 300 + seed)
        for what, model in (merges | {"random weights": fresh(400 + seed)}).items()
    }


def locked(model: Any, seed: int) -> Any:
    """A copy of `model` with the weights it has while MergeLock is attached."""
    made = deepcopy(model)
    with regard.attach(model, [regard.place("mergelock", seed=seed)]):
        made.load_state_dict(model.state_dict())
    return made


def average(first: Any, second: Any) -> Any:
    made = deepcopy(first)
    with torch.no_grad():
        for weight, other in zip(made.parameters(), second.parameters(), strict=True):
            weight.lerp_(other, 0.5)
    return made


def distance(model: Any, base: Any) -> float:
    """How far the weights lie from those of `base`, over the norm of the latter."""
    own, of_base = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, base))
    return ((own - of_base).norm() / of_base.norm()).item()


def aligned(model: Any, relative: Any) -> Any:
    """The attack: a copy of the locked `model`, every layer turned back towards the bases of `relative`."""
    made = deepcopy(model)
    theirs, known = open_decoder(made), open_decoder(relative)
    for layer in range(theirs.layers):
        turned = turned_back(projections.read(theirs, layer), projections.read(known, layer))
        for weight, value in projections.write(theirs, layer, turned):
            weight.data.copy_(value)
    return made


def turned_back(made: Projections, known: Projections) -> Projections:
    """`made` in the bases of `known`, found by least squares; every channel of a head must be rotary.

    What is found for queries and keys commutes with rotary positions and what is found for values is invertible, so
    the model computes what it did, however badly the two fit.
    """
    kv_heads, size = made.v.shape[:2]
    group, half = len(made.q) // kv_heads, size // 2
    new, old = (torch.complex(p.q[:, :half], p.q[:, half:]).unflatten(0, (kv_heads, group)) for p in (made, known))
    # A scaled turn of a pair of channels is one complex factor.
    factor = (old.conj() * new).sum((1, 3)) / old.abs().square().sum((1, 3))
    a, b = factor.real.diag_embed(), factor.imag.diag_embed()
    qk = torch.cat((torch.cat((a, b), -1), torch.cat((-b, a), -1)), -2)
    vo = torch.linalg.lstsq(known.v.mT, made.v.mT).solution
    return mergelock.turn_vo(mergelock.turn_qk(made, torch.linalg.inv(qk), group), torch.linalg.inv(vo), group)


def fresh(seed: int) -> Any:
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=SYMBOLS + 1 + len(TASKS), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config)


def trained(model: Any, tasks: tuple[int, ...], steps: int, rate: float, seed: int, rows: int = 64) -> Any:
    """A copy of `model` after `steps` of AdamW, a batch in equal shares of `tasks`; the rate warms up, then falls."""
    made, drawn = deepcopy(model).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(made.parameters(), lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * (1 - s / steps))
    for _ in range(steps):
        ids = torch.cat([sample(task, rows // len(tasks), drawn) for task in tasks])
        optimizer.zero_grad()
        F.cross_entropy(logits(made, ids).flatten(0, 1), ids[:, -LENGTH:].flatten()).backward()
        optimizer.step()
        schedule.step()
    return made.eval()


@torch.no_grad()
def accuracy(model: Any, rows: int = 1024) -> dict[str, float]:
    """The share of the answers' symbols that `model` finds, a task, on words drawn apart from those of training."""
    found = {}
    for task, name in enumerate(TASKS):
        ids = sample(task, rows, torch.Generator().manual_seed(10_000 + task))
        found[name] = (logits(model, ids).argmax(-1) == ids[:, -LENGTH:]).float().mean().item()
    return found


def sample(task: int, rows: int, drawn: torch.Generator) -> Tensor:
    """`[rows, 2 + 2 LENGTH]`: the task's mark, a word, a stop, the answer."""
    word = torch.randint(SYMBOLS, (rows, LENGTH), generator=drawn)
    mark, stop = (torch.full((rows, 1), SYMBOLS + 1 + task), torch.full((rows, 1), SYMBOLS))
    return torch.cat((mark, word, stop, word.flip(1) if TASKS[task] == "reverse" else word.roll(-1, 1)), 1)


def logits(model: Any, ids: Tensor) -> Tensor:
    """`[rows, LENGTH, V]`, those that predict the answer."""
    return model(input_ids=ids[:, :-1], use_cache=False).logits[:, -LENGTH:]
