# SPDX-License-Identifier: Apache-2.0
"""The benchmark: group sampling and shared-prompt updates beside what they replace. See examples/rba_bench.py."""
