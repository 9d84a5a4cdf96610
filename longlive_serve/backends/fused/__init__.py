# SPDX-License-Identifier: Apache-2.0
"""PyTorch weights with fused Triton kernels and CUDA graphs."""
