from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class EraseUserRequest(_message.Message):
    __slots__ = ("operation_id", "user_id")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    user_id: str
    def __init__(self, operation_id: _Optional[str] = ..., user_id: _Optional[str] = ...) -> None: ...

class EraseUserResponse(_message.Message):
    __slots__ = ("conversations_left",)
    CONVERSATIONS_LEFT_FIELD_NUMBER: _ClassVar[int]
    conversations_left: int
    def __init__(self, conversations_left: _Optional[int] = ...) -> None: ...
