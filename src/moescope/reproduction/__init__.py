"""Published studies, run again: as they were done, beside what they found, and done right."""

from moescope.reproduction.run import reproduce

__all__ = ["reproduce"]
