# SPDX-License-Identifier: Apache-2.0
"""The wire format: requests, responses, options and errors. Needs only NumPy, so that the client can import it."""
