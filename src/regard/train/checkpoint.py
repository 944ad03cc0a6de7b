"""Checkpoints: everything the next step depends on, as safetensors and JSON, written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from regard.core.errors import RegardError
from regard.train.settings import differences

FORMAT = 1
FOLDER = "checkpoints"
_TENSORS, _STATE = "tensors.safetensors", "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def write(out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, told: Mapping[str, Any]) -> Path:
    """Write `out/checkpoints/step-<step>`, then remove the ones before it.

    A folder appears under that name only once all of it is on the disk, so whatever ends this process leaves either
    the new checkpoint or the one before. It holds the weights, AdamW's moments, torch's random states, and `told`.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    before = list(folder.iterdir())
    part = folder / f".part-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    data = save_tensors(_tensors(model, optimizer))
    state = {
        "format": FORMAT,
        "step": step,
        "device": _device(model).type,
        "layout": layout(model),
        "sha256": hashlib.sha256(data).hexdigest(),
        **told,
    }
    _flushed(part / _TENSORS, data)
    _flushed(part / _STATE, json.dumps(state).encode())
    target = folder / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    for old in before:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint of the run in `out`."""
    return max((out / FOLDER).glob("step-*"), default=None)


def read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, told: Mapping[str, Any]) -> dict[str, Any]:
    """Put the checkpoint back into `model`, `optimizer` and torch's random states, and return its state.

    `told["settings"]` and `told["about"]` must be those it was written with.

    Raises:
        RegardError: it is damaged, of another format, layout or device, or of a run with other settings or data;
            nothing has been changed then.
    """
    state = look(folder)
    tensors = _open(folder, state)
    for what in ("settings", "about"):
        if found := differences(_plain(told[what]), state[what]):
            raise RegardError(f"checkpoint {folder} is of another run: {'; '.join(found)}")
    _same_layout(folder, layout(model), state["layout"])
    device = _device(model).type
    if state["device"] != device:
        raise RegardError(f"checkpoint {folder} was written on {state['device']!r}, this run is on {device!r}")
    with torch.no_grad():
        for name, tensor in _weights(model).items():
            tensor.copy_(tensors[f"model.{name}"])
    for name, weight in _trained(model, optimizer).items():
        moments = {key: tensors[f"optimizer.{name}.{key}"] for key in _MOMENTS if f"optimizer.{name}.{key}" in tensors}
        if moments:
            # torch keeps AdamW's step count on the CPU unless the optimiser is fused.
            held = {
                key: value if key == "step" and not _fused(optimizer) else value.to(weight.device)
                for key, value in moments.items()
            }
            optimizer.state[weight] = held
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], _device(model))
    return state


def layout(model: nn.Module) -> dict[str, str]:
    """Dtype and shape of every weight and buffer that is saved."""
    return {name: f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in _weights(model).items()}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Every saved tensor of the model, once where several names share it."""
    seen: dict[int, str] = {}
    return {
        name: x
        for name, x in model.state_dict().items()
        if seen.setdefault(x.data_ptr(), name) == name or not x.numel()
    }


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in held}


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"model.{name}": tensor for name, tensor in _weights(model).items()}
    for name, weight in _trained(model, optimizer).items():
        found |= {
            f"optimizer.{name}.{key}": optimizer.state[weight][key] for key in _MOMENTS if weight in optimizer.state
        }
    found["random.cpu"] = torch.get_rng_state()
    if (device := _device(model)).type == "cuda":
        found["random.cuda"] = torch.cuda.get_rng_state(device)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _flushed(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def look(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: `settings`, `about` (its data), `step`, `layout`, `result`.

    Raises:
        RegardError: it is damaged, or of another format.
    """
    try:
        state = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise RegardError(f"checkpoint {folder} cannot be read: {error}") from error
    said = set(state) if isinstance(state, dict) else set()
    if missing := {"format", "settings", "about", "layout", "device", "result", "sha256"} - said:
        raise RegardError(f"checkpoint {folder} is damaged: {_STATE} does not say {', '.join(sorted(missing))}")
    if state["format"] != FORMAT:
        raise RegardError(f"checkpoint {folder} has format {state['format']}, this version reads {FORMAT}")
    return state


def _open(folder: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    try:
        data = (folder / _TENSORS).read_bytes()
        if hashlib.sha256(data).hexdigest() != state["sha256"]:
            raise RegardError(f"checkpoint {folder} is damaged: {_TENSORS} is not the file that was written")
        return load_tensors(data)
    except (OSError, SafetensorError) as error:
        raise RegardError(f"checkpoint {folder} cannot be read: {error}") from error


def _same_layout(folder: Path, mine: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    for name in {**theirs, **mine}:
        if mine.get(name) != theirs.get(name):
            raise RegardError(
                f"checkpoint {folder} has another layout: {name} is {theirs.get(name, 'absent')} there and "
                f"{mine.get(name, 'absent')} in this model"
            )
