"""Benchmarks of encoder_fast: ``python -m bench --help``, from the repository's root.

Every figure is measured beside its peers in the same run, after a parity check, and written to a
record in ``bench/results/`` the moment it is there. Cases are defined in :mod:`bench.ops` and
:mod:`bench.models`, timing in :mod:`bench.timing`, what is run where in :mod:`bench.suites`.
"""
