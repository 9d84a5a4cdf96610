# SPDX-License-Identifier: Apache-2.0
"""What the server says about itself: metrics, traces, log lines."""
