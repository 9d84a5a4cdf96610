# SPDX-License-Identifier: Apache-2.0
"""What the service survives: real servers, real clients, real faults. Each trial is a command."""
