"""Measurements and long proofs, run by `whispr bench NAME`. Each prints a table and JSON and asserts no speed."""
