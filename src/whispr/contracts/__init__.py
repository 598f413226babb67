"""Generated from proto/, checked in, never edited."""
