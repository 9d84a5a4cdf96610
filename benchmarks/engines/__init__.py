# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the backends without a server: frame rate, first frame, prompt switch, live sessions."""
