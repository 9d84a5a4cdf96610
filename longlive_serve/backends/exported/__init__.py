# SPDX-License-Identifier: Apache-2.0
"""Backends that run ONNX graphs and TensorRT engines."""
