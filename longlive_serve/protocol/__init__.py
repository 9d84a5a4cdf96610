# SPDX-License-Identifier: Apache-2.0
"""The wire: what requests and responses hold. NumPy alone, so that the client can import it."""
