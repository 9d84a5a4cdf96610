# SPDX-License-Identifier: Apache-2.0
"""Stress tests: killed servers, invalid requests, unauthorized access, half an hour of load."""
