# SPDX-License-Identifier: Apache-2.0
"""Backends without a server: frames per second, first frame, prompt switch, live sessions."""
