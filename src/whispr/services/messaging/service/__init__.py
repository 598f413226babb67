"""The rules of messaging, by subject. No transport, no SQL."""
