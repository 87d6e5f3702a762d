"""Runs carried in and out: recorded conversations, their import, and the export of what was recorded and judged."""
