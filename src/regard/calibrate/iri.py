"""Causal tracing on text for IRI [175]: which layers' outputs at the last token restore the answer.

A prompt is run clean, then with noise on the embeddings of the tokens that the answer depends on. Into the noisy
run one part's output of one layer is put back as it was in the clean one, at the last token. What that recovers
of the answer's probability is the layer's recovery rate.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.families import Decoder
from regard.adapters.seam import open_free
from regard.calibrate.common import Progress
from regard.core.errors import RegardError
from regard.measure.replay import forward, quiet
from regard.observe.tracing import LEAST, Patches

PARTS = ("attention", "feed_forward")


@dataclass(frozen=True)
class Sample:
    """A prompt, the token that should follow it, and the tokens that this depends on.

    Args:
        prompt: `[n]` int64.
        answer: token id.
        span: half-open range of the prompt's tokens that noise is put on; not the last one.
    """

    prompt: Tensor
    answer: int
    span: tuple[int, int]


@dataclass(frozen=True)
class Recovery:
    """Mean recovery rates, `[L]` float64 each, over `used` samples; `skipped` ones did not mind the noise."""

    attention: Tensor
    feed_forward: Tensor
    used: int
    skipped: int


def fit(
    model: nn.Module,
    tokens: Tensor,
    *,
    progress: Progress | None = None,
    samples: Sequence[Sample] | None = None,
    count: int = 32,
    length: int = 64,
    span: int = 2,
    noise: float = 3.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Recovery rates `{"attention_rates": [L], "feed_forward_rates": [L]}`, float32.

    Args:
        model: a causal language model, not attached; it is not changed.
        tokens: `[n]` text to draw samples from (see `recurrences`).
        progress: told samples done and samples in all.
        samples: prompts with answers of one's own, in place of drawn ones.
        count: samples drawn at most.
        length: tokens of a drawn prompt.
        span: tokens that noise is put on in a drawn prompt.
        noise: its standard deviation, in those of the prompt's embeddings.
        seed: of the samples and the noise.

    Raises:
        RegardError: as `recurrences` and `trace`.
    """
    drawn = recurrences(tokens, count, length, span, seed) if samples is None else samples
    found = trace(model, drawn, noise=noise, seed=seed, progress=progress)
    return {"attention_rates": found.attention.float(), "feed_forward_rates": found.feed_forward.float()}


def recurrences(tokens: Tensor, count: int, length: int, span: int = 2, seed: int = 0) -> list[Sample]:
    """Prompts of `length` tokens whose next token stands in them exactly once: text that must be looked up.

    Noise goes on that earlier place: the token, and the `span - 1` before it, which lead to it.

    Raises:
        RegardError: the text is too short, or no token of it recurs so.
    """
    if span < 1 or length < span + 2:
        raise RegardError(f"samples need span >= 1 and length >= span + 2, got span={span}, length={length}")
    if len(tokens) <= length:
        raise RegardError(f"samples of {length} tokens and an answer need more text than {len(tokens)} tokens")
    found: list[Sample] = []
    ends = torch.randperm(len(tokens) - length, generator=torch.Generator().manual_seed(seed)) + length
    for end in ends.tolist():
        prompt, answer = tokens[end - length : end], int(tokens[end])
        at = (prompt == answer).nonzero()[:, 0].tolist()
        # The last token is the row that is traced: it stays clean.
        if len(at) == 1 and span - 1 <= at[0] < length - 1:
            found.append(Sample(prompt, answer, (at[0] - span + 1, at[0] + 1)))
        if len(found) == count:
            break
    if not found:
        raise RegardError(f"no token of the text recurs after {length} tokens in which it stands once; give samples")
    return found


def trace(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    noise: float = 3.0,
    seed: int = 0,
    batch: int = 64,
    progress: Progress | None = None,
) -> Recovery:
    """Recovery rates of every layer's attention and feed-forward output at the last token.

    `(p_patched - p_noisy) / (p_clean - p_noisy)`, p the answer's probability, mean over the samples; those whose
    denominator is below 0.001 are skipped and counted.

    Args:
        model: a causal language model, not attached.
        samples: one at least.
        noise: standard deviation, in those of the prompt's embeddings.
        seed: of the noise.
        batch: layers patched in one forward.
        progress: told samples done and samples in all.

    Raises:
        RegardError: a span is empty, outside its prompt or on its last token; all samples are skipped; the
            family does not tell where the parts of a layer stand.
    """
    for number, sample in enumerate(samples):
        start, stop = sample.span
        if not 0 <= start < stop < len(sample.prompt):
            raise RegardError(
                f"sample {number} has span {sample.span} in {len(sample.prompt)} tokens; a span needs one token at "
                "least, and not the last one, which is traced"
            )
    decoder, _ = open_free(model)
    layers, drawn = decoder.layers, torch.Generator().manual_seed(seed)
    # Row 0 patches nothing, each other row one part of one layer.
    single = torch.eye(2 * layers, dtype=torch.bool).view(-1, 2, layers)
    patches = torch.cat((torch.zeros_like(single[:1]), single))
    rates, used = torch.zeros(2, layers, dtype=torch.float64), 0
    for done, sample in enumerate(samples):
        clean, found = probabilities(model, decoder, sample, patches, noise, drawn, batch)
        lost = clean - float(found[0])
        if lost >= LEAST:
            rates += ((found[1:] - found[0]) / lost).view(2, layers)
            used += 1
        if progress is not None:
            progress(done + 1, len(samples))
    if not used:
        raise RegardError(
            f"noise {noise:g} changes the probability of none of the {len(samples)} answers by {LEAST:g}: the answers "
            "do not depend on the spans, or the noise is too small"
        )
    return Recovery(rates[0] / used, rates[1] / used, used, len(samples) - used)


def probabilities(
    model: Any,
    decoder: Decoder,
    sample: Sample,
    patches: Tensor,
    noise: float,
    drawn: torch.Generator,
    batch: int = 64,
) -> tuple[float, Tensor]:
    """The answer's probability in the clean run, and in noisy runs with the last token patched, `[n]` float64.

    Args:
        model: a causal language model.
        decoder: opened from it.
        sample: what is asked.
        patches: `[n, 2, L]` bool: which attention (0) and feed-forward (1) outputs are those of the clean run.
        noise: standard deviation, in those of the prompt's embeddings.
        drawn: the noise.
        batch: runs in one forward.
    """
    device = next(model.parameters()).device
    ids, parts, given = sample.prompt[None].to(device), Patches(PARTS), _Embedded()
    embeddings: Any = decoder.module
    hook = embeddings.get_input_embeddings().register_forward_hook(given.hook)
    try:
        with quiet(model), parts.on(decoder):
            parts.recording = True
            clean = _answer(forward(model, ids, None, keep=1), sample.answer)
            parts.recording = False
            parts.clean = {place: x[:, -1:] for place, x in parts.clean.items()}
            # The last token alone is patched, so what comes before it is run once.
            given.disturb(sample.span, noise, drawn)
            before = forward(model, ids[:, :-1], None, keep=1).past_key_values
            given.noise, found = None, []
            parts.rows = torch.ones(1, 1, dtype=torch.bool, device=device)
            for part in patches.split(batch):
                cache = copy.deepcopy(before)
                cache.batch_repeat_interleave(len(part))
                parts.chosen = part.to(device)
                found.append(_answer(forward(model, ids[:, -1:].expand(len(part), -1), cache, keep=1), sample.answer))
    finally:
        hook.remove()
    return float(clean), torch.cat(found)


class _Embedded:
    """Embeddings as they come, or with noise on a span."""

    def __init__(self) -> None:
        self.clean = torch.empty(0)
        self.noise: tuple[slice, Tensor] | None = None

    def disturb(self, span: tuple[int, int], noise: float, drawn: torch.Generator) -> None:
        """From now on there is noise on `span`, of `noise` standard deviations of the embeddings seen last."""
        scale = noise * self.clean.float().std()
        made = torch.randn(span[1] - span[0], self.clean.shape[-1], generator=drawn)
        self.noise = slice(*span), scale * made.to(scale)

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self.noise is None:
            self.clean = out
            return out
        (span, noise), noisy = self.noise, out.clone()
        noisy[:, span] += noise.to(out)
        return noisy


def _answer(out: Any, answer: int) -> Tensor:
    """Probability of `answer` at the last row, `[B]` float64."""
    return out.logits[:, -1].double().softmax(-1)[:, answer].cpu()
