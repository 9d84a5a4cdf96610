# SPDX-License-Identifier: Apache-2.0
"""Results of a simulation: metrics, tables, plots."""
