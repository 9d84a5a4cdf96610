# SPDX-License-Identifier: Apache-2.0
"""Layers in 8 bits and the scales of FP8."""
