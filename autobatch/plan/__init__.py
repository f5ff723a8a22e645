"""What users hold: `Plan`, over its plain record.

Imports accumulate, report, exports and advice; tuning and everything above may import it.
"""
