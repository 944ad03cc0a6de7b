"""One layer's attention under its Slots, in running order; imports no paper."""

from torch import Tensor

from regard.core.slots import Slots, State
from regard.core.step import Step
from regard.core.store import View


def run(
    slots: Slots, view: View, q: Tensor, step: Step, state: State, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of `q [B, H, T, D]` over `view`: prepare, attend, mix. Returns out `[B, H, T, Dv]`.

    Keys and values were prepared when they were stored. Edits chain in the recipe's order.
    """
    for edit in slots.prepare:
        q = edit.query(q, step)
    out, _ = view.attend(q, pattern=slots.pattern, step=step, scale=scale, softcap=softcap)
    for edit in slots.mix:
        out = edit.run(out, step, state)
    return out
