# SPDX-License-Identifier: Apache-2.0
"""Checks of images, manifests, alerts and dashboards without a cluster."""
