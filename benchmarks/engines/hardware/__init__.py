# SPDX-License-Identifier: Apache-2.0
"""Peak speed of the device, FLOP counts of a chunk, and the attention kernels."""
