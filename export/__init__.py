# SPDX-License-Identifier: Apache-2.0
"""Exports the models as ONNX graphs, builds TensorRT engines from them, and converts weights."""
