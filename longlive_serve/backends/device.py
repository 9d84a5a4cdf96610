# SPDX-License-Identifier: Apache-2.0
"""Which device a thread uses; tensors to it, and frames back through pinned memory: it copies while the host goes on.

Used by the model runner, the backends and snapshots. On the CPU nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def use_device(device: str) -> None:
    """Kernels, graphs and events of this thread are of `device` from now on. Every thread that computes calls it."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on `device`; does not wait for it."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class AsyncD2HCopy:
    """A tensor on its way to the host, where it comes as soon as the work queued for it so far is done."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._event = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        """Until it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
