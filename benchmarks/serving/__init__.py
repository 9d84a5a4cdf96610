# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of a server over gRPC, with simulated viewers."""
