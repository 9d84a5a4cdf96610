# SPDX-License-Identifier: Apache-2.0
"""The causal DiT, its KV cache and its noise levels."""
