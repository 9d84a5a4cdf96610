# SPDX-License-Identifier: Apache-2.0
"""Measures the engines on one device, in one process, beside an eager baseline: `python -m longlive_serve.bench`."""
