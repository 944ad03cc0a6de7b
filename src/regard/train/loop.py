"""Training a causal language model: the loop. It knows the model as `model(input_ids, labels=...)` and no more."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core.errors import RegardError
from regard.kernels.device import capturing
from regard.kernels.graphs import Replay, own_stream
from regard.train import checkpoint
from regard.train.data import Batch, Source
from regard.train.progress import Watcher
from regard.train.settings import Settings

# Rows that are measured at once.
MEASURED_AT_ONCE = 64
# The last loss is told to watchers this often: reading it makes the host wait for the device.
TOLD_EVERY = 10
DECAYED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


@dataclass
class Result:
    """What a run did; the losses, measurements and seconds of all its parts if it was continued.

    Args:
        step: optimiser steps taken.
        losses: the training loss of every step, nats an answer.
        measured: `step`, `loss` and, of a task, `accuracy` on held-out rows, each time they were measured.
        seconds: spent in the loop.
        ended: `steps` (all done), `target` (the accuracy was reached) or `asked` (somebody asked to stop).
        eager: why steps were launched one by one, not replayed as a CUDA graph; empty: they were replayed.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    ended: str = ""
    eager: str = ""

    @property
    def final(self) -> dict[str, float]:
        """The last measurement."""
        return self.measured[-1] if self.measured else {}


def train(
    model: Any,
    source: Source,
    settings: Settings,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    watchers: Sequence[Watcher] = (),
    asked: Callable[[], bool] = lambda: False,
) -> Result:
    """Train `model` where it is, on the rows of `source`.

    Given the settings and the machine, the result is the same every time (on a GPU as far as its kernels are), also
    if it was continued from a checkpoint; the model's first weights are the caller's. On CUDA steps and measurements
    are replayed as graphs, with the same numbers, where they can be: `settings.graphs`, `Result.eager`.

    Args:
        model: float32 weights; called as `model(input_ids=[B, L], labels=[B, L])`, which shifts labels itself, or for
            tasks as `model(input_ids=[B, L])` with the output embeddings a module of its own.
        source: where rows come from.
        settings: how.
        out: where checkpoints go; None: there are none.
        resume: go on from the newest checkpoint in `out`; if there is none, begin.
        watchers: told about losses and measurements.
        asked: asked after every step whether to stop; a checkpoint is written then.

    Raises:
        RegardError: tokens that the model has no row for; `out` holds a run and `resume` is off; a checkpoint of
            another layout or other settings; a loss that is not finite (no checkpoint is written after it); steps that
            cannot be captured though the settings want it.
    """
    run = _Run(model, source, settings, Path(out) if out is not None else None, watchers)
    run.begin(resume)
    with own_stream(run.device) as apart, apart:
        return deque(run.steps(asked), maxlen=1)[0]


def paced(
    model: Any,
    source: Source,
    settings: Settings,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    watchers: Sequence[Watcher] = (),
    asked: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """`train`, a step each time the next result is asked for; the last one is the whole.

    So one thread can lead several runs at once. On CUDA each has a stream of its own, and small models share the device
    better than one after the other. Those with dropout share its random numbers too: run them alone.
    """
    run = _Run(model, source, settings, Path(out) if out is not None else None, watchers)
    run.begin(resume)
    steps = run.steps(asked)
    with own_stream(run.device) as apart:
        while True:
            with apart:
                result = next(steps, None)
            if result is None:
                return
            yield result


class _Run:
    def __init__(self, model: Any, source: Source, settings: Settings, out: Path | None, watchers: Sequence[Watcher]):
        self.model, self.source, self.settings, self.out, self.watchers = model, source, settings, out, watchers
        self.device = next(model.parameters()).device
        rows = model.get_input_embeddings().num_embeddings
        if source.vocabulary > rows:
            raise RegardError(f"the data have {source.vocabulary} different tokens, the model embeds {rows}")
        self.optimizer = optimizer(model, settings)
        self.told = {"settings": settings.to_json(), "about": source.about}
        self.result = Result()
        self.unread: list[Tensor] = []
        self.take = Replay(self.launch, self.device, settings.graphs)

    def begin(self, resume: bool) -> None:
        """Start at the newest checkpoint, if there is one and it may be used."""
        found = checkpoint.latest(self.out) if self.out is not None else None
        if found is None:
            return
        if not resume:
            raise RegardError(
                f"{str(self.out)!r} holds a run already ({found.name}): resume it, or name another folder"
            )
        state = checkpoint.read(found, self.model, self.optimizer, self.told)
        self.result = Result(**state["result"])

    def steps(self, asked: Callable[[], bool]) -> Iterator[Result]:
        """Take the steps that are left; the result so far after each, and at the end."""
        settings, result = self.settings, self.result
        held = self.source.held_out().to(self.device)
        # Measurements that cannot be captured have the same figures: no reason to refuse a run.
        look = Replay(lambda: figures(self.model, held), self.device, settings.graphs and None)
        for watcher in self.watchers:
            watcher.begin(result.step, settings.steps)
        self.model.train()
        began, before = time.perf_counter(), result.seconds
        while result.step < settings.steps and result.ended != "target":
            self.unread.append(self.step(result.step))
            result.step += 1
            last, stop = result.step == settings.steps, asked()
            if last or stop or result.step % TOLD_EVERY == 0:
                self.read_losses()
            if last or result.step % settings.evaluate == 0:
                self.measure(look)
            result.seconds = before + time.perf_counter() - began
            result.ended = "target" if self.reached() else "steps" if last else "asked" if stop else ""
            if self.out is not None and (result.ended or result.step % settings.checkpoint == 0):
                self.read_losses()
                checkpoint.write(
                    self.out, result.step, self.model, self.optimizer, self.told | {"result": vars(result)}
                )
            if stop:
                break
            yield result
        self.read_losses()
        self.model.eval()
        yield result

    def step(self, number: int) -> Tensor:
        """One optimiser step; its loss and the norm of its gradient, not read yet."""
        rate = self.settings.rate_at(number)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        found = self.take(*self.source.batch(number).to(self.device).tensors)
        self.result.eager = self.take.why
        return found

    def launch(self, *tensors: Tensor) -> Tensor:
        """What a step computes of a batch's `tensors`: no look at a value, the same shapes every time."""
        for group in self.optimizer.param_groups:
            # torch warns of such steps where none is captured, and refuses others where one is.
            group["capturable"] = capturing(self.device)
        try:
            losses = []
            for part in Batch(*tensors).parts(self.settings.accumulate):
                with self.cast():
                    loss = loss_of(self.model, part)[0] / self.settings.accumulate
                loss.backward()
                losses.append(loss.detach())
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return torch.stack((torch.stack(losses).sum(), norm))

    def cast(self) -> torch.autocast:
        """Under this the model runs in bfloat16, if asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def read_losses(self) -> None:
        """Bring the losses of the last steps from the device."""
        if not self.unread:
            return
        read = torch.stack(self.unread).tolist()
        self.unread.clear()
        losses = [loss for loss, _ in read]
        for number, (loss, norm) in enumerate(read, len(self.result.losses) + 1):
            if not math.isfinite(loss + norm):
                what = f"the loss of step {number} is {loss}, the norm of its gradient {norm}"
                raise RegardError(f"{what}: lower the rate ({self.settings.rate}) or clip (clip {self.settings.clip})")
        self.result.losses += losses
        for watcher in self.watchers:
            watcher.losses(self.result.step, losses, self.settings.rate_at(self.result.step - 1))

    def measure(self, look: Callable[[], Tensor]) -> None:
        """Loss and accuracy on held-out rows."""
        self.model.eval()
        with torch.no_grad(), self.cast():
            values = look().tolist()
        found = {"step": self.result.step, **dict(zip(("loss", "accuracy"), values, strict=False))}
        self.model.train()
        self.result.measured.append(found)
        for watcher in self.watchers:
            watcher.measured(found)

    def reached(self) -> bool:
        """Whether the last step was measured at the target."""
        final = self.result.final
        return final.get("step") == self.result.step and final.get("accuracy", -1.0) >= self.settings.target


def optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays weights of linear maps, convolutions and embeddings: no norm, no bias, nothing of a gate."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, DECAYED)}
    groups = [
        {"params": [w for w in weights if id(w) in decayed], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if id(w) not in decayed], "weight_decay": 0.0},
    ]
    fused = all(weight.device.type == "cuda" for weight in weights)
    betas = (settings.beta1, settings.beta2)
    # A graph reads the rate from where it lies.
    rate = torch.tensor(settings.rate, device=weights[0].device) if fused else settings.rate
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=betas, fused=fused)


def loss_of(model: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Mean cross-entropy of a batch, and of a task what the model says at each place, `[B, n]`."""
    if batch.places is None or batch.answers is None:
        return model(input_ids=batch.inputs, labels=batch.inputs, use_cache=False).loss, None
    logits = logits_at(model, batch.inputs, batch.places)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()), logits.detach().argmax(-1)


def logits_at(model: Any, inputs: Tensor, places: Tensor) -> Tensor:
    """The logits `[B, n, V]` of `model` at `places [B, n]` alone: the output embeddings see no other position."""

    def pick(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = given[0]
        return (hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])),)

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        return model(input_ids=inputs, use_cache=False).logits
    finally:
        hook.remove()


def figures(model: Any, held: Batch) -> Tensor:
    """Mean loss on the rows of `held`, which lie where `model` does, and for a task also the mean over rows of the
    fraction answered rightly: `[1]` or `[2]`, not read yet.
    """
    losses, right = [], []
    for part in held.parts(math.ceil(len(held.inputs) / MEASURED_AT_ONCE)):
        loss, said = loss_of(model, part)
        losses.append(loss.float() * len(part.inputs))
        if said is not None:
            right.append((said == part.answers).float().mean(1))
    loss = torch.stack(losses).sum() / len(held.inputs)
    return torch.stack([loss, torch.cat(right).mean()] if right else [loss])


def save(
    model: Any, source: Source, settings: Settings, result: Result, out: str | Path, facts: dict[str, Any]
) -> None:
    """Make `out` a folder that `from_pretrained` reads, with `train.json` beside: settings, figures, `facts`."""
    out = Path(out)
    model.save_pretrained(out)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(out)
    told = {"settings": settings.to_json(), "data": source.about, **vars(result), **facts}
    part = out / ".train.json"
    part.write_text(json.dumps(told, indent=1) + "\n")
    part.replace(out / "train.json")
