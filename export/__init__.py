# SPDX-License-Identifier: Apache-2.0
"""The models as graphs: ONNX files, and TensorRT engines built from them."""
