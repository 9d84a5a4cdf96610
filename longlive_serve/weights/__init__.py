# SPDX-License-Identifier: Apache-2.0
"""From files of weights to models in memory."""
