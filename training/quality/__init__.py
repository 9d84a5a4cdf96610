# SPDX-License-Identifier: Apache-2.0
"""What the demo network shows, read off its frames."""
