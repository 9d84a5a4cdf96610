# SPDX-License-Identifier: Apache-2.0
"""The decoders that turn latents into frames."""
