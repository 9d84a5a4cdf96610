# SPDX-License-Identifier: Apache-2.0
"""Models ready to run, by what runs them. `registry.build_backends` chooses."""
