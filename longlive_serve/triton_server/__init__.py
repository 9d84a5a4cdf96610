# SPDX-License-Identifier: Apache-2.0
"""Starts Triton Inference Server as a process and stops it. Knows nothing about videos."""
