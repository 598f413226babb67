"""The services. Each owns its data; they meet only through `client.py`, wired in a neighbour's `app.py`."""
