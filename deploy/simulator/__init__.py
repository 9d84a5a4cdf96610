# SPDX-License-Identifier: Apache-2.0
"""A fleet of GPU pods under Kubernetes' autoscaler, as a discrete-event simulation: `python -m deploy.simulator`."""
