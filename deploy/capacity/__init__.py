# SPDX-License-Identifier: Apache-2.0
"""Sessions per GPU, and their price."""
