# SPDX-License-Identifier: Apache-2.0
"""Deployment: checks of the manifests, capacity planning and a simulator of the autoscaling."""
