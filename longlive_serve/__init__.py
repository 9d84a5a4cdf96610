# SPDX-License-Identifier: Apache-2.0
"""LongLive 1.0 as a streaming service: models, KV state, sessions and the service that runs them."""

import os

__version__ = "0.2.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or ONNX Runtime reports to its makers once it is loaded
