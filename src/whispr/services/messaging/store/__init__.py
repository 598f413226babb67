"""Every SQL statement of messaging, one function each, by subject."""
