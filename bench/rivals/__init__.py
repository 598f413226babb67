"""Other servers that do the same work, installed on demand into folders of their own."""
