"""What users hold: `Plan`, the face of its plain record.

Imports accumulate, report, exports and advice; tuning and everything above may import it.
"""

from autobatch.plan.plan import Plan

__all__ = ["Plan"]
