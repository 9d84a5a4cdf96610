# SPDX-License-Identifier: Apache-2.0
"""The client library: streams the video of a session over gRPC, and resumes it when a connection breaks."""
