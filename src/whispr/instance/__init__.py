"""One machine, one command: what `whispr up` runs.

An instance is a data directory with its own PostgreSQL, Valkey, certificate authority, service processes and
gateway, all children of one supervisor. The instance knows the services only as commands to start, ports to give
out and paths to route; it imports none of their code.
"""
