"""Scheduling decides when something is done, does it then, and keeps what became of it."""
