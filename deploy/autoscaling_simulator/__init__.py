# SPDX-License-Identifier: Apache-2.0
"""Simulates a fleet of servers under load: the cost of a scaling policy and its effect on viewers."""
