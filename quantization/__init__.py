# SPDX-License-Identifier: Apache-2.0
"""Makes 8-bit checkpoints of the models with NVIDIA ModelOpt, and measures what that costs."""
