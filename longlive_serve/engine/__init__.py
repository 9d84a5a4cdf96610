# SPDX-License-Identifier: Apache-2.0
"""The engine: takes requests, schedules and generates chunks, sends responses."""
