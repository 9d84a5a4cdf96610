# SPDX-License-Identifier: Apache-2.0
"""The models as graphs: ONNX files, and TensorRT plans built from them."""
