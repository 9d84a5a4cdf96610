# SPDX-License-Identifier: Apache-2.0
"""What a machine lacks to serve, what fits on it, and what to do. It needs nothing but NumPy, and loads no model."""
