# SPDX-License-Identifier: Apache-2.0
"""Which device a thread uses; tensors to it, and frames back through pinned memory: it copies while the host goes on.

Used by the pipeline and the engines. On the CPU nothing is copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def use_device(device: str) -> None:
    """Kernels, graphs and events of this thread are of `device` from now on. Every thread that computes calls it."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def to_device(tensor: Tensor, device: str) -> Tensor:
    """A tensor of the CPU on `device`; does not wait for it."""
    if not device.startswith("cuda"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> np.ndarray[Any, Any]:
    """What the tensor holds once the work queued for it is done; waits for that."""
    if not tensor.is_cuda:
        return tensor.cpu().numpy()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned.numpy()  # it keeps its memory from being used again
