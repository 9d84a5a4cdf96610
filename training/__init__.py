# SPDX-License-Identifier: Apache-2.0
"""Training of the demo model: its world, latents and training runs. Not part of the wheel."""
