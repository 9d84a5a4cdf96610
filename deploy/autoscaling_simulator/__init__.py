# SPDX-License-Identifier: Apache-2.0
"""A fleet of servers under load, simulated: what a scaling policy costs and what viewers notice."""
