# SPDX-License-Identifier: Apache-2.0
"""A server over gRPC, as viewers notice it."""
