# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels for the parts of the DiT and of the VAE that lie between the matrix products.

Backends choose them, models do not know of them. They need the package `triton`, which CUDA builds of torch bring
along. Where TRITON_INTERPRET=1 is set before triton is imported they run on the CPU, slowly: to see what they compute.

They share: a program works on whole rows; inputs are float32, bfloat16 or float16; statistics and arithmetic are
float32; results are rounded once, to the dtype they are stored in. All stay on the current stream and wait for nothing.
"""

import triton

if triton.knobs.runtime.interpret:
    from longlive_serve.kernels.interpreter import compute_like_a_gpu

    compute_like_a_gpu()
