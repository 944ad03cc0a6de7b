"""Where Triton kernels run. Does not import Triton, so that it may be asked anywhere."""

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

OLDEST = 80  # compute capability 8.0: bfloat16, asynchronous copies

_kept: dict[int, Any] = {}


def refuses(tensor: Tensor) -> str | None:
    """Why no Triton kernel can run where `tensor` lies, or None."""
    return _refuses(tensor.device)


@cache
def _refuses(device: torch.device) -> str | None:
    """Asked several times in a call, so that looking anew each time would show in a decoded token."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"kernels run on a CUDA device, not on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST:
        return f"kernels need compute capability {OLDEST / 10}; {device} has {major}.{minor}"
    if find_spec("triton") is None:
        return "kernels need Triton, which is not installed (pip install triton)"
    return None


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def captured_graph(stream: int) -> int:
    """A number of its own for each capture; `stream`, by its handle, is part of one.

    Raises:
        RuntimeError: the driver does not say.
    """
    status, number = ctypes.c_int(), ctypes.c_uint64()
    ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    if error := ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None):
        raise RuntimeError(f"cuStreamGetCaptureInfo answers with error {error}")
    return number.value


def keep_for_graphs(held: Any, device: torch.device) -> Any:
    """`held`, kept for good if a CUDA graph is being captured.

    A graph reads tensors by address whenever it is replayed. Those made while it is captured are its own; those of a
    cache, made before, must not be dropped by it.
    """
    if capturing(device):
        _kept[id(held)] = held
    return held


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of `device`; (0, 0) where it is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
