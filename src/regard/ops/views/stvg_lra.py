"""Which track of a clip, and when, a question looks at, after a visual prompt was tuned for it (LRA, TAS)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.ops.maps import on_grid, resized

CARD = Card(
    title="Unleashing the Potential of Multimodal LLMs for Zero-Shot Spatio-Temporal Video Grounding",
    arxiv="2509.15178",
    sheet=105,
    implements="The ratio of two maps, scores of tracks, the window in time, the reversed clip, and the visual prompt "
    "that is tuned at test time so that the answer is yes.",
    exact=False,
    saving="none",
    departures=(
        "Joining the map of the reversed clip by the mean is inferred.",
        "The sub-queries come from the caller; the paper has a language model write them.",
    ),
    oracles=(
        "equal questions: the ratio is 1; no iteration: the prompt is 0, so the model is its own",
        "the prompt's gradient equals finite differences on a tiny model, and a small step lowers the loss",
        "a clip reversed twice is the clip",
        "a planted object: two updates raise the margin of yes, and the track and window are found at least as often",
    ),
    aliases=("lra", "logit_guided_re_attention"),
    options={
        "floor": Option(kind="float", default=1e-4, low=0.0, doc="added to the neutral map"),
        "frames": Option(default=11, low=1, doc="length of the window (the release stops when it has more than 10)"),
    },
)
Score = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Shown:
    """What of a clip is shown.

    Args:
        track: the best proposal.
        scores: `[N]`, of every proposal.
        start: the first frame.
        stop: behind the last.
        ratio: `[frames, h, w]`.
    """

    track: int
    scores: Tensor
    start: int
    stop: int
    ratio: Tensor


def show(
    asked: Tensor,
    neutral: Tensor,
    masks: Tensor,
    grid: Sequence[int],
    *,
    floor: float = 1e-4,
    frames: int = 11,
) -> Shown:
    """The proposed track that the question attends to more than a neutral one does, and when.

    Args:
        asked: `[frames x h x w]` float: attention of the grounding token to the visual tokens under the question, mean
            over heads and layers (the paper: from the 26th last up to the 6th last, which is left out).
        neutral: the same under "describe the video".
        masks: `[N, frames, H, W]` bool or float, the proposals of a segmenter.
        grid: frames, rows and columns of the visual tokens.
        floor: added to the neutral map.
        frames: length of the window, the whole clip if that is shorter.

    Raises:
        RegardError: there is no proposal, maps, masks and grid disagree, or a map holds NaN.

    Source: arXiv 2509.15178; zaiquanyang/LLaVA_Next_STVG, stvg/datasets/evaluation/hcstvg_eval.py.
    """
    if len(tuple(grid)) != 3:
        raise RegardError(f"a clip has frames, rows and columns, got a grid of {tuple(grid)}")
    if masks.ndim != 4 or not len(masks) or masks.shape[1] != grid[0]:
        raise RegardError(f"proposals must be [at least 1, {grid[0]} frames, H, W], got {list(masks.shape)}")
    if asked.shape != neutral.shape:
        raise RegardError(f"the maps of the two questions differ: {list(asked.shape)} and {list(neutral.shape)}")
    if frames < 1 or floor < 0:
        raise RegardError(f"frames must be at least 1 and floor at least 0, got {frames} and {floor}")
    ratio = on_grid(asked, grid) / (on_grid(neutral, grid) + floor)
    by_frame = (masks * resized(ratio, masks.shape[2:])).amax((2, 3))
    scores = by_frame.amax(1)
    track = int(scores.argmax())
    start, stop = window(by_frame[track], frames)
    return Shown(track, scores, start, stop, ratio)


def window(values: Tensor, frames: int) -> tuple[int, int]:
    """Start and stop of `frames` of `values [F]` around the largest, grown towards the larger neighbour, then right."""
    told = values.tolist()
    start = int(values.argmax())
    stop = start + 1
    while stop - start < min(frames, len(told)):
        if start and (stop == len(told) or told[start - 1] > told[stop]):
            start -= 1
        else:
            stop += 1
    return start, stop


def assembled(forward: Tensor, backward: Tensor) -> Tensor:
    """The mean of a map `[frames, ...]` and that of the clip with its frames reversed."""
    return (forward + backward.flip(0)) / 2


def margin(logits: Tensor, yes: int, no: int) -> Tensor:
    """`z_yes - z_no` of `logits [..., V]` at the first token of the answer.

    Raises:
        RegardError: a token id is not in the vocabulary.
    """
    for name, token in (("yes", yes), ("no", no)):
        if not 0 <= token < logits.shape[-1]:
            raise RegardError(f"token {token} for {name!r} is not in the vocabulary of {logits.shape[-1]}")
    return logits[..., yes] - logits[..., no]


def loss(asked: Tensor, neutral: Tensor) -> Tensor:
    """`sum [1 - (d_asked - d_neutral)]` of the margins of all sub-queries `[n]`."""
    return (1 - (asked - neutral)).sum()


def tune(score: Score, visual: Tensor, *, iterations: int = 2, rate: float = 8.0) -> tuple[Tensor, tuple[float, ...]]:
    """The visual prompt P under which "yes" wins: `iterations` steps from 0 down the gradient of `loss`.

    Every step feeds `visual + (P + P before the last step) / 2`, as released. Weights get no gradient.

    Args:
        score: takes the visual tokens and gives the margins of the questions and of the neutral one, `[n]` each.
        visual: `[tokens, d]`, or any shape that `score` takes.
        iterations: steps (the paper: 2).
        rate: eta (the paper: 8).

    Returns:
        P in visual's shape, and the loss before every step. Where a gradient is not finite P stays as it was, and the
        steps end.

    Raises:
        RegardError: under `torch.inference_mode()`, or `score` does not depend on the visual tokens.
    """
    if torch.is_inference_mode_enabled() or visual.is_inference():
        raise RegardError("tuning a visual prompt needs gradients; leave torch.inference_mode()")
    visual = visual.detach()
    prompt, before = torch.zeros_like(visual), torch.zeros_like(visual)
    losses = []
    for _ in range(iterations):
        with torch.enable_grad():
            prompt.requires_grad_()
            value = loss(*score(visual + (prompt + before) / 2))
            if not value.requires_grad:
                raise RegardError("the margins do not depend on the visual tokens, so no prompt can be tuned")
            (gradient,) = torch.autograd.grad(value, prompt)
        losses.append(float(value.detach()))
        prompt = prompt.detach()
        if not gradient.isfinite().all():
            break
        before, prompt = prompt, prompt - rate * gradient
    return prompt, tuple(losses)
