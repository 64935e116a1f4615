"""Turning published annotations into shards: parallel, bounded in memory, resumable after a kill, idempotent."""

from data_modules.writing.engine import write_source
from data_modules.writing.plan import Plan, Progress, Report, WritingError

__all__ = ["Plan", "Progress", "Report", "WritingError", "write_source"]
