# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels for the parts of the DiT and of the VAE between the matrix products.

Used by the fused models and backends. They need the package `triton`, which CUDA builds of torch include. If
TRITON_INTERPRET=1 is set before triton is imported, they run on the CPU, slowly, to check what they compute.

In all of them a program works on whole rows; inputs are float32, bfloat16 or float16; statistics and arithmetic are
float32; results are rounded once, to the dtype they are stored in. They run on the current stream, asynchronously.
"""

import triton

if triton.knobs.runtime.interpret:
    from longlive_serve.kernels.interpreter import compute_like_a_gpu

    compute_like_a_gpu()
