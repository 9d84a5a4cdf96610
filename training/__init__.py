# SPDX-License-Identifier: Apache-2.0
"""How the small demo model is made: its world, its latents, its training. Not part of the wheel."""
