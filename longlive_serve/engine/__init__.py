# SPDX-License-Identifier: Apache-2.0
"""Sessions: takes requests, schedules chunks, generates them, answers."""
