# SPDX-License-Identifier: Apache-2.0
"""Many GPUs: how many there should be at any time, what they hold and what they cost."""
