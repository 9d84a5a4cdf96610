# SPDX-License-Identifier: Apache-2.0
"""Long and hostile runs: killed servers, wrong requests, strangers, half an hour of viewers."""
