# SPDX-License-Identifier: Apache-2.0
"""A tiny world for the laptop recipe: a domain of requests, a text teacher, voices, a speech encoder, a SALM."""
