# SPDX-License-Identifier: Apache-2.0
"""The client: `video_stream.VideoStream` is one session; `python -m client.generate` writes videos with it."""
