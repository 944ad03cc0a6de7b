"""What a search knows before its first trial: trained tensors, and which layers mind a mechanism most."""

import hashlib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard.adapters.families import open_decoder
from regard.catalog import Entry
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.measure.quality import dense, quality
from regard.measure.text import windows
from regard.recipes.legal import refusal, settings
from regard.search.space import bits, sparing, width

Progress = Callable[[str, int, int], None]
# One window for the sensitivity of layers: long enough that a small recent window bites.
CONTEXT, CONTINUATION = 384, 48


@dataclass(frozen=True)
class Calibration:
    """Fitted tensors and layer sensitivities of each mechanism.

    Args:
        tensors: stem -> option -> tensor, as `calibrate/<stem>.py` fitted them.
        sensitivity: stem -> `[L]` float64 KL (nats per token) when only that layer carries the mechanism
            at its coarsest searched setting.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    sensitivity: Mapping[str, Tensor] = field(default_factory=dict)

    def order(self) -> dict[str, list[int]]:
        """Layers of each stem from most to least sensitive."""
        return {s: torch.argsort(kl, descending=True, stable=True).tolist() for s, kl in self.sensitivity.items()}

    @property
    def digest(self) -> str:
        """A short name of the numbers inside."""
        told = hashlib.sha256()
        for name, tensor in sorted(_flat(self).items()):
            told.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return told.hexdigest()[:12]


def calibrate(
    model: Any,
    tokens: Tensor,
    entries: Sequence[Entry],
    layers: int,
    *,
    cache: Path | None = None,
    key: str = "",
    progress: Progress | None = None,
    refuse: Callable[[str, str], None] | None = None,
) -> Calibration:
    """Fit and probe every mechanism of `entries` on `tokens [n]`; read from `cache` if it holds them.

    Args:
        model: a transformers causal language model, not attached.
        tokens: calibration text, `[n]` int64.
        entries: the mechanisms.
        layers: the model's layers `L`.
        cache: a `.safetensors` file, written after each mechanism.
        key: names model and text; a cache of another key is not read.
        progress: told the mechanism, steps done and steps in all.
        refuse: told a mechanism that cannot be fitted to this model or probed on it, and why; None: that raises.

    Raises:
        RegardError: a mechanism cannot be fitted or probed, and there is no `refuse`.
    """
    report = progress or (lambda name, done, total: None)
    held = _load(cache, key)
    tensors, sensitivity = dict(held.tensors), dict(held.sensitivity)
    for entry in entries:
        if entry.stem in tensors or entry.stem in sensitivity:
            continue
        try:
            if fit := fitter(entry):
                tensors[entry.stem] = fit(model, tokens, progress=_steps(report, f"fitting {entry.stem}"))
            elif sparing(entry):
                sensitivity[entry.stem] = probe(model, tokens, entry, layers, report)
            else:
                continue
        except RegardError as error:
            if refuse is None:
                raise
            refuse(entry.stem, str(error))
            continue
        _save(cache, key, Calibration(tensors, sensitivity))
    stems = {e.stem for e in entries}
    return Calibration(
        {s: t for s, t in tensors.items() if s in stems}, {s: t for s, t in sensitivity.items() if s in stems}
    )


def fitter(entry: Entry) -> Callable[..., dict[str, Tensor]] | None:
    """`fit` of `calibrate/<stem>.py` if text is all it needs; else None, and `unfittable` says why."""
    fit = _fit(entry)
    return None if fit is None or _required(fit) else fit


def unfittable(entry: Entry) -> str | None:
    """Why a search cannot fit `entry`; None if it can, or if nothing of it is fitted."""
    if not any(o.kind == "tensor" for o in entry.card.options.values()):
        return None
    fit = _fit(entry)
    if fit is None:
        return f"{entry.stem!r} must be fitted, and there is no regard/calibrate/{entry.stem}.py"
    if needed := _required(fit):
        return (
            f"{entry.stem!r} is fitted on {', '.join(needed)}, and a search has only text; "
            f"fit it with {fit.__module__}.fit and place it yourself"
        )
    return None


def _fit(entry: Entry) -> Callable[..., dict[str, Tensor]] | None:
    name = f"regard.calibrate.{entry.stem}"
    if not any(o.kind == "tensor" for o in entry.card.options.values()) or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name).fit


def _required(fit: Callable[..., Any]) -> list[str]:
    """Keywords without which `fit` cannot be called."""
    parameters = inspect.signature(fit).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def probe(model: Any, tokens: Tensor, entry: Entry, layers: int, report: Progress) -> Tensor:
    """KL, nats per token, with `entry` at its coarsest on one layer at a time; `[L]` float64.

    Of several `bits` options only the first is coarse: the others are spared by no layer.
    """
    options = {}
    finest = bits(entry)
    for name, option in entry.card.options.items():
        if name in finest:
            pick = min if name == finest[0] else max
            options[name] = pick(option.search, key=width)
        elif option.search and option.kind in ("int", "float"):
            numbers = [v for v in option.search if v is not None]
            options[name] = option.default if finest or not numbers else min(numbers)
    decoder = open_decoder(model)
    # What is coarsest may not be served on this model: then the first setting that is.
    able = (o for o in (options, *settings(entry)) if not refusal([Placement(entry.stem, options=o)], decoder))
    options = next(able, options)
    size = CONTEXT + CONTINUATION
    context = CONTEXT if len(tokens) >= size else max(1, len(tokens) - CONTINUATION)
    window = windows(tokens, context, min(CONTINUATION, len(tokens) - context), 1)
    reference = dense(model, window, CONTINUATION)
    found = torch.zeros(layers, dtype=torch.float64)
    for layer in range(layers):
        placed = [Placement(entry.stem, (layer,), "all", options)]
        found[layer] = quality(model, placed, window, CONTINUATION, reference).kl
        report(f"probing {entry.stem}", layer + 1, layers)
    return found


def _steps(report: Progress, name: str) -> Callable[..., None]:
    """`progress(done, total)` of a fit as a report; fits may tell more than these two."""
    return lambda done, total=0, *_more, **_named: report(name, int(done), int(total))


def _flat(calibration: Calibration) -> dict[str, Tensor]:
    found = {f"sensitivity/{stem}": t for stem, t in calibration.sensitivity.items()}
    for stem, group in calibration.tensors.items():
        found |= {f"tensors/{stem}/{name}": t for name, t in group.items()}
    return found


def _save(path: Path | None, key: str, calibration: Calibration) -> None:
    """Written whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        tensors = {name: t.detach().cpu().contiguous() for name, t in _flat(calibration).items()}
        save_file(tensors, part, metadata={"regard": json.dumps({"key": key})})
        part.replace(path)


def _load(path: Path | None, key: str) -> Calibration:
    """What `path` holds for `key`; empty if it is missing, broken, or for something else."""
    if path is None or not path.is_file():
        return Calibration()
    tensors: dict[str, dict[str, Tensor]] = {}
    sensitivity: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("regard", "{}")).get("key") != key:
                return Calibration()
            for name in file.keys():  # noqa: SIM118 (not a dict)
                kind, stem, *rest = name.split("/")
                if kind == "sensitivity":
                    sensitivity[stem] = file.get_tensor(name)
                else:
                    tensors.setdefault(stem, {})[rest[0]] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError):
        return Calibration()
    return Calibration(tensors, sensitivity)
