"""Notification decides who is told what, how and when, and keeps the history of it."""
