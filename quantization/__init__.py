# SPDX-License-Identifier: Apache-2.0
"""Quantizes the models to 8 bits with NVIDIA ModelOpt, and measures the loss of quality."""
