"""What a reader needs to trust or repeat a figure: model, text, machine, versions, commit."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.models import pretrained


def machine(model: Any) -> dict[str, Any]:
    """Machine, versions and commit, as JSON."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("regard", "torch", "transformers", "optuna")},
        "commit": _commit(),
    }


def model_facts(model: Any) -> dict[str, Any]:
    """Which model this is, as JSON; `digest` covers its config and a sample of every weight."""
    return {
        "name": pretrained.name_of(model),
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "digest": model_digest(model),
    }


def model_digest(model: Any) -> str:
    """A short name of the weights and the config, the same wherever the model was loaded from."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    told = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        step = max(1, weight.numel() // 256)
        sample = weight.detach().flatten()[::step][:256].float().cpu().numpy().tobytes()
        told.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + sample)
    return told.hexdigest()[:12]


def text_digest(tokens: Tensor) -> str:
    """A short name of `tokens [n]`."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()[:12]


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    for line in told.read_text().splitlines() if told.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package lies in, `+` if files differ from it; None outside one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # A checkout around site-packages is somebody else's.
    return None if "site-packages" in here.parts else found.stdout.strip()
