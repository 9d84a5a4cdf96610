# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs and TensorRT engines in the place of PyTorch modules."""
