"""Whispr: the complete backend of an end-to-end-encrypted messenger that anyone can host."""

__version__ = "0.1.0"
