# SPDX-License-Identifier: Apache-2.0
"""The models, in PyTorch: text encoder, DiT, VAE decoders."""
