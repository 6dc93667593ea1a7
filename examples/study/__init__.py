# SPDX-License-Identifier: Apache-2.0
"""The fair test of the claim: many arms, rates, seeds and sizes. See examples/rba_study.py."""
