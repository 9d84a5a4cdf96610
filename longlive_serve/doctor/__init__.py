# SPDX-License-Identifier: Apache-2.0
"""Checks whether a machine can serve, and how many sessions fit. Needs only NumPy, and loads no model."""
