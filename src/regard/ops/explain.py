"""Which backend a call of `regard.attend` runs on, and why not the others."""

from dataclasses import dataclass

from torch import Tensor

from regard.core.pattern import Pattern
from regard.ops.attention import Verdict, choose, verdicts


@dataclass(frozen=True)
class Explanation:
    """`print` it. `backend` runs, because of `why`; `verdicts` are those of all backends, in the order asked.

    `density` is the share of causal pairs that the pattern allows, by counting (None: no pattern, or too long for it).
    """

    backend: str
    why: str
    verdicts: tuple[Verdict, ...]
    density: float | None

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}"]
        if self.density is not None:
            lines.append(f"the pattern allows {self.density:.1%} of the pairs of causal attention")
        for verdict in self.verdicts:
            if verdict.backend == self.backend:
                continue
            said = f"refuses: {verdict.refuses}" if verdict.refuses else verdict.yields or "can do it, asked later"
            lines.append(f"  not {verdict.backend}: {said}")
        return "\n".join(lines)


# Tokens up to which pairs are counted: a second or so on a CPU.
COUNTED = 16_384


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    backend: str = "auto",
) -> Explanation:
    """What `regard.attend` would do with the same arguments (shapes, dtypes and devices count, not values).

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`.
        v: `[B, Hk, S, Dv]`.
        pattern: as `regard.attend` has it.
        bias: the same.
        softcap: the same.
        causal: the same.
        q_positions: the same.
        k_positions: the same.
        backend: the same.

    Raises:
        RegardError: no such backend, or a named one refuses the call.
    """
    aligned = q_positions is None and k_positions is None
    wanted = Pattern.causal() if pattern is None and causal else pattern
    call = {"pattern": wanted, "bias": bias, "softcap": softcap, "aligned": aligned}
    name, why = choose(q, k, v, backend=backend, **call)
    counted = pattern is not None and aligned and k.shape[2] <= COUNTED
    density = pattern.density(k.shape[2], k.shape[1]) if pattern is not None and counted else None
    return Explanation(name, why, tuple(verdicts(q, k, v, **call)), density)
