"""RAT [135]: a gated recurrence in every chunk, softmax attention over what earlier chunks left."""

import torch
from torch import Tensor, nn

from regard.core.errors import RegardError
from regard.kernels import device
from regard.layers.blocks.heads import Output, join, linear, size, split
from regard.layers.blocks.norms import wide
from regard.layers.blocks.recur import check
from regard.ops.states.rat import State, scan
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o(sigmoid(z) * rat(q, k, v, g))`, with z, v, g, q, k from one projection.

    A request remembers one key and one value a chunk, and the running summary of the open one.

    Args:
        width: channels of the residual stream.
        heads: H.
        chunk: tokens a chunk, C.
        groups: G; queries and keys that heads share: head h reads group `h % G`. None: 2, or 1 for an odd H.
        base: of the rotary positions, counted in chunks; None: none.

    Raises:
        RegardError: the width does not divide among the heads, heads are not a multiple of groups, a chunk is below 1.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        chunk: int = 16,
        groups: int | None = None,
        base: float | None = 10000.0,
    ):
        super().__init__()
        d = size("values", width, 1.0, heads)
        groups = 2 - heads % 2 if groups is None else groups
        if groups < 1 or heads % groups:
            raise RegardError(f"heads must be a multiple of groups, got {heads} heads and {groups} groups")
        if chunk < 1:
            raise RegardError(f"chunk must be at least 1, got {chunk}")
        if base is not None and d % 2:
            raise RegardError(f"rotary positions need an even head size, got {d}; base=None leaves them out")
        self.width, self.heads, self.groups, self.chunk, self.base = width, heads, groups, chunk, base
        self.sizes = (width, width, width, groups * d, groups * d)
        self.inputs = linear(width, sum(self.sizes))
        self.bias = nn.Parameter(self.initial()["bias"])
        self.out = Output(width, width, bias=False)

    def initial(self) -> dict[str, Tensor]:
        """Starting values of the parameters that are not projections: log U(1, C - 1), so that chunks are spanned."""
        return {"bias": torch.empty(self.width).uniform_(1, max(self.chunk - 1, 1)).log()}

    def forward(
        self,
        x: Tensor,
        *,
        memory: Memory | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`x [B, T, width]`, `mask [B, T]` bool (False: padding): `y [B, T, width]`."""
        check(x, self.width, memory, mask, cu_seqlens)
        joined = self.inputs(x)
        if memory is None and mask is None and cu_seqlens is None and self._refuses(joined) is None:
            from regard.kernels.states import rat as kernel

            call = {"heads": self.heads, "groups": self.groups, "chunk": self.chunk, "base": self.base}
            return self.out(kernel.mix(joined, self.bias, **call))
        z, v, g, q, k = joined.split(self.sizes, -1)
        # The sum is float32 because the bias is.
        gate = torch.sigmoid(g + wide(self.bias)).to(v.dtype)
        q, k = (split(part, self.groups) for part in (q, k))
        v, gate = (split(part, self.heads) for part in (v, gate))
        call = {"chunk": self.chunk, "base": self.base, "mask": mask, "cu_seqlens": cu_seqlens}
        out, state = scan(q, k, v, gate, initial_state=self._recall(memory), check=False, **call)
        if memory is not None:
            self._keep(memory, state)
        # torch computes the sigmoid of half precision in float32.
        return self.out(torch.sigmoid(z) * join(out))

    def _refuses(self, joined: Tensor) -> str | None:
        """Why no kernel can do what stands between the projections, or None."""
        if refusal := device.refuses(joined):
            return refusal
        from regard.kernels.states import rat as kernel

        return kernel.refuses(joined, heads=self.heads, groups=self.groups)

    def _recall(self, memory: Memory | None) -> State | None:
        """The state that `memory` holds, None before the first token.

        Raises:
            RegardError: it was made with other chunks.
        """
        if memory is None or memory.seen == 0:
            return None
        keys, values, key, value = (memory.get(name) for name in ("keys", "values", "key", "value"))
        if keys is None or values is None or key is None or value is None:
            raise RegardError(f"this memory has seen {memory.seen} tokens, but not with a RAT mixer: {memory}")
        if keys.shape[2] != -(-memory.seen // self.chunk):
            raise RegardError(
                f"the memory has {keys.shape[2]} entries for {memory.seen} tokens, which is not one for {self.chunk}: "
                "it was made by a mixer with another chunk"
            )
        return State(keys, values, key, value, memory.seen, self.chunk, memory.get("count"))

    def _keep(self, memory: Memory, state: State) -> None:
        """Leave `state` in `memory`."""
        for name in ("keys", "values", "key", "value", "count"):
            if (held := getattr(state, name)) is not None:
                memory.set(name, held)
        memory.advance(state.seen - memory.seen)
