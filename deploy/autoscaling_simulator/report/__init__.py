# SPDX-License-Identifier: Apache-2.0
"""What a simulated fleet came to: figures, tables, plots."""
