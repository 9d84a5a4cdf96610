# SPDX-License-Identifier: Apache-2.0
"""What is served and how: sizes of the models, the settings file. The first floor: imports no other room."""
