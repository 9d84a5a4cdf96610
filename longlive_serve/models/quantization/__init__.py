# SPDX-License-Identifier: Apache-2.0
"""8-bit layers and FP8 scales."""
