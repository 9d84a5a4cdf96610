# SPDX-License-Identifier: Apache-2.0
"""An eager baseline that works as the reference code does."""
