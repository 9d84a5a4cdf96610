# SPDX-License-Identifier: Apache-2.0
"""Sizes of the models and the settings file. It imports no other package of longlive_serve."""
