# SPDX-License-Identifier: Apache-2.0
"""Metrics, traces and logs of the server."""
