"""The log-sum-exp of attention that somebody else runs, overheard from torch's fused kernels, which compute it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WHOLE = aten.scaled_dot_product_attention.default
# Where each kernel is told whether to compute it; None: it always does.
TOLD = {
    aten._scaled_dot_product_flash_attention.default: None,
    aten._scaled_dot_product_flash_attention_for_cpu.default: None,
    aten._scaled_dot_product_efficient_attention.default: 4,
    aten._scaled_dot_product_cudnn_attention.default: 4,
}


class Overheard(TorchDispatchMode):
    """Inside, `lse` is that of the last fused kernel that ran, `[B, H, T]` float32; None: none did.

    Outputs are what they would be without: the same kernels run on the same tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lse: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is WHOLE:  # seen under inference_mode, where nothing takes it apart before
            with self:
                return func.decompose(*args, **kwargs)
        place = TOLD.get(func)
        if place is not None:
            args = (*args[:place], True, *args[place + 1 :])
        out = func(*args, **kwargs)
        if func in TOLD:
            # Kernels may give more rows than there are, or one more axis.
            self._lse = out[1].flatten(2)[..., : args[0].shape[2]]
        return out

    def taken(self, heads: int, rows: int) -> Tensor | None:
        """What was overheard, if it is of `heads` query heads and `rows` rows."""
        fits = self._lse is not None and tuple(self._lse.shape[1:]) == (heads, rows)
        return self._lse if fits else None
