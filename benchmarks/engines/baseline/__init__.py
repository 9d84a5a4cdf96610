# SPDX-License-Identifier: Apache-2.0
"""The reference code's way of working, to compare with."""
