# SPDX-License-Identifier: Apache-2.0
"""Quality of the demo model, measured on its frames."""
