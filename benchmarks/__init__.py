# SPDX-License-Identifier: Apache-2.0
"""What measures speed, and the one writer of results/*.json."""
