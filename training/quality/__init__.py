# SPDX-License-Identifier: Apache-2.0
"""What the demo model shows, read off its frames."""
