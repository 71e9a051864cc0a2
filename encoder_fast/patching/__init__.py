"""Putting the fast path into a live model, and taking it out again.

The only place that touches a model, and the only place that decides between the fast path and the
original forward.
"""

from encoder_fast.patching.reporting import Report, report
from encoder_fast.patching.swap import patch, patched, unpatch

__all__ = ["Report", "patch", "patched", "report", "unpatch"]
