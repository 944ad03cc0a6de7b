"""One way into a recurrence for every mixer: whole sequences, chunks of a request, packed ones, single tokens."""

from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.ops.recurrence import scan, step, without_padding
from regard.primitives.memory import Memory


def check(x: Tensor, width: int, memory: Memory | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Read the shapes of a mixer's call.

    Raises:
        RegardError: `x` is not `[B, T, width]`, `mask` not bool `[B, T]`, or arguments do not go together.
    """
    if x.dim() != 3 or x.shape[-1] != width:
        raise RegardError(f"a mixer of width {width} takes [B, T, {width}], got {list(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise RegardError(f"mask must be bool {list(x.shape[:2])} (True: a token), got {mask.dtype} {list(mask.shape)}")
    if cu_seqlens is not None and (memory is not None or mask is not None):
        other = "memory" if memory is not None else "mask"
        raise RegardError(f"packed sequences are whole and without padding: pass cu_seqlens or {other}, not both")
    if cu_seqlens is not None and x.shape[0] != 1:
        raise RegardError(f"packed sequences lie in one row, got a batch of {x.shape[0]}")


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    memory: Memory | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    **gates: Any,
) -> Tensor:
    """`regard.scan` from the state that `memory` holds, which is left as the tokens made it: `out [B, H, T, Dv]`.

    Gates hold by construction, so that their values are not read. Single tokens update the state in place unless
    gradients are wanted.
    """
    state = memory.get("state") if memory is not None else None
    if state is not None and q.shape[2] == 1 and not torch.is_grad_enabled():
        if mask is not None:
            q, k, v, decay, beta = without_padding(mask, q, k, v, gates.get("decay"), gates.get("beta"))
            gates |= {"decay": decay, "beta": beta}
        return step(q, k, v, state=state, **gates)
    more: dict[str, Any] = {"initial_state": state, "cu_seqlens": cu_seqlens, "mask": mask, "check": False}
    out, state = scan(q, k, v, **more, **gates)
    if memory is not None:
        memory.set("state", state)
    return out
