"""Where Triton kernels run. Does not import Triton, so that it may be asked anywhere."""

from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST = 80  # compute capability 8.0: bfloat16, asynchronous copies


def refuses(tensor: Tensor) -> str | None:
    """Why no Triton kernel can run where `tensor` lies, or None."""
    if not tensor.is_cuda or torch.version.hip is not None:
        return f"kernels run on a CUDA device, not on {tensor.device}"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if 10 * major + minor < OLDEST:
        return f"kernels need compute capability {OLDEST / 10}; {tensor.device} has {major}.{minor}"
    if find_spec("triton") is None:
        return "kernels need Triton, which is not installed (pip install triton)"
    return None


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the device of `tensor`; (0, 0) where it is no GPU."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)
