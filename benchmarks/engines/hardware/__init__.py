# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do, and what parts of a chunk take of that."""
