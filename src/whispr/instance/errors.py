"""Failures of starting or running an instance, told to the person at the terminal."""


class InstanceError(Exception):
    """Something the operator must know or do; the message is complete as it stands."""


class AlreadyRunning(InstanceError):
    """Another `whispr up` holds the data directory."""


class PortInUse(InstanceError):
    """The public port is taken by another program."""


class StartFailed(InstanceError):
    """A part did not become ready in time, or ended while starting."""
