# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, and the only writer of results/*.json."""
