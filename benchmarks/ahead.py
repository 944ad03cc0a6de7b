"""Another package's kernels compiled side by side, before its autotuner would compile them one after the other.

Where a kernel is first called, Triton's autotuner compiles all of its configurations in turn: minutes, if a package has
hundreds. Here a process for each of up to 16 cores walks through the same calls, launches none of these kernels, and
compiles its share of their configurations into a cache that all of them have. Whoever measures with that cache
afterwards finds binaries, and its autotuner still times every configuration by itself, if need be for less long.
"""

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Every process holds the arguments of its calls on the device: 64 of them filled 140 GB.
MOST = 16


@dataclass
class Share:
    """What one process found and did: configurations met, those of its share that were compiled, and that were not."""

    met: int = 0
    compiled: int = 0
    late: int = 0
    refused: int = 0


def side_by_side(walk: Callable[..., None], *arguments: Any, folder: str, seconds: float) -> dict[str, float]:
    """Compile what `walk(*arguments)` would autotune into the Triton cache `folder`.

    Args:
        walk: makes the calls, on the device; it must not depend on their results.
        arguments: of `walk`.
        folder: where the binaries go.
        seconds: nothing is begun after so many.

    Returns:
        Configurations met, compiled, begun too late and refused by the compiler, and the seconds it took.
    """
    began, workers = time.time(), min(os.cpu_count() or 1, MOST)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        jobs = [pool.submit(_work, walk, arguments, folder, rank, workers, began + seconds) for rank in range(workers)]
        shares = [job.result() for job in jobs]
    sums = {name: sum(getattr(share, name) for share in shares) for name in ("compiled", "late", "refused")}
    return {"met": max(share.met for share in shares)} | sums | {"seconds": time.time() - began}


@contextmanager
def briefly(milliseconds: int) -> Iterator[None]:
    """Inside, an autotuner times each configuration for so long (Triton's own choice is 100 ms)."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    def timed(call: Callable[[], Any], quantiles: tuple[float, ...]) -> Any:
        return do_bench(call, warmup=milliseconds // 4, rep=milliseconds, quantiles=quantiles)

    saved, Autotuner.do_bench = Autotuner.do_bench, property(lambda tuner: timed)
    try:
        yield
    finally:
        Autotuner.do_bench = saved


def _work(
    walk: Callable[..., None], arguments: tuple[Any, ...], folder: str, rank: int, ranks: int, until: float
) -> Share:
    os.environ["TRITON_CACHE_DIR"] = folder
    with shared(rank, ranks, until) as share:
        walk(*arguments)
    return share


@contextmanager
def shared(rank: int, ranks: int, until: float) -> Iterator[Share]:
    """Inside, a kernel with an autotuner is not launched, and every `ranks`-th of its configurations is compiled."""
    from triton.runtime.autotuner import Autotuner

    share, turn, seen = Share(), itertools.count(), set()

    def run(tuner: Autotuner, *arguments: Any, **keywords: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
        given = {**tuner.nargs, **keywords}
        kinds = [str(getattr(x, "dtype", "")) for x in given.values()]
        key = (id(tuner), *(given.get(name) for name in tuner.keys), *kinds)
        if key in seen:
            return
        seen.add(key)
        for config in tuner.prune_configs(keywords):
            share.met += 1
            if next(turn) % ranks != rank:
                continue
            if time.time() > until:
                share.late += 1
                continue
            try:
                tuner.fn.run(*arguments, **{**keywords, **config.all_kwargs(), "warmup": True})
                share.compiled += 1
            except Exception:  # the autotuner meets it again, and passes over it or says why
                share.refused += 1

    saved, Autotuner.run = Autotuner.run, run
    try:
        yield share
    finally:
        Autotuner.run = saved
