# SPDX-License-Identifier: Apache-2.0
"""Starts Triton Inference Server as a process and ends it. Knows nothing of videos."""
