"""What a person runs: one file a verb."""

__version__ = "0.1.0"
