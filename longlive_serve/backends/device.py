# SPDX-License-Identifier: Apache-2.0
"""Device selection per thread, and asynchronous copies to and from the device through pinned memory.

Used by the model runner, the backends and snapshots. On the CPU nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def use_device(device: str) -> None:
    """Set the device of this thread's kernels, graphs and events. Every thread that computes calls it."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to `device`, without waiting for the copy."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class AsyncD2HCopy:
    """An asynchronous copy of a tensor to the host, queued on the current stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._event = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        """Wait for the copy; returns the tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
