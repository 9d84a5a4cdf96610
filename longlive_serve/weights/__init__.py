# SPDX-License-Identifier: Apache-2.0
"""Loads files of weights into models."""
