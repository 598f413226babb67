from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class RunMaintenanceRequest(_message.Message):
    __slots__ = ("operation_id", "task")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    task: str
    def __init__(self, operation_id: _Optional[str] = ..., task: _Optional[str] = ...) -> None: ...

class RunMaintenanceResponse(_message.Message):
    __slots__ = ("task", "affected", "seconds")
    TASK_FIELD_NUMBER: _ClassVar[int]
    AFFECTED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    task: str
    affected: int
    seconds: float
    def __init__(self, task: _Optional[str] = ..., affected: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...
