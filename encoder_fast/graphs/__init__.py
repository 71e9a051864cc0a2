"""CUDA graphs: a forward whose kernels are launched at once, for batches too small to keep a GPU
busy while the host launches them one by one.

A recorded forward is for one size of everything, so batches are rounded up to a bucket
(:mod:`~encoder_fast.graphs.bucket`): behind the real tokens come some that belong to no sequence,
and behind the real sequences some without a token. They change nothing for the real ones.
"""

from encoder_fast.graphs.cache import GraphCache, Inputs, Replayed
from encoder_fast.graphs.counts import GraphCounts, GraphReport
from encoder_fast.graphs.recorder import recorder_for

__all__ = ["GraphCache", "GraphCounts", "GraphReport", "Inputs", "Replayed", "recorder_for"]
