# SPDX-License-Identifier: Apache-2.0
"""LongLive 1.0 as a streaming service: networks, KV state, sessions and the service that runs them."""

__version__ = "0.1.0"
