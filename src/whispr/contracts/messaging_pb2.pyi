import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

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

class CleanupExpiredMessagesRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class CleanupExpiredMessagesResponse(_message.Message):
    __slots__ = ("expired", "purged", "more")
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    PURGED_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    expired: int
    purged: int
    more: bool
    def __init__(self, expired: _Optional[int] = ..., purged: _Optional[int] = ..., more: _Optional[bool] = ...) -> None: ...

class SendScheduledMessageRequest(_message.Message):
    __slots__ = ("operation_id", "scheduled_id")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    scheduled_id: str
    def __init__(self, operation_id: _Optional[str] = ..., scheduled_id: _Optional[str] = ...) -> None: ...

class SendScheduledMessageResponse(_message.Message):
    __slots__ = ("status", "message_id", "failure", "send_at")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    SEND_AT_FIELD_NUMBER: _ClassVar[int]
    status: str
    message_id: str
    failure: str
    send_at: _timestamp_pb2.Timestamp
    def __init__(self, status: _Optional[str] = ..., message_id: _Optional[str] = ..., failure: _Optional[str] = ..., send_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class AuthorizeMediaAccessRequest(_message.Message):
    __slots__ = ("user_id", "media_id", "owner_id")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    MEDIA_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    media_id: str
    owner_id: str
    def __init__(self, user_id: _Optional[str] = ..., media_id: _Optional[str] = ..., owner_id: _Optional[str] = ...) -> None: ...

class AuthorizeMediaAccessResponse(_message.Message):
    __slots__ = ("allowed",)
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    allowed: bool
    def __init__(self, allowed: _Optional[bool] = ...) -> None: ...

class GenerateUsageReportRequest(_message.Message):
    __slots__ = ("operation_id", "until")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    until: _timestamp_pb2.Timestamp
    def __init__(self, operation_id: _Optional[str] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., **kwargs) -> None: ...

class GenerateUsageReportResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: str
    def __init__(self, report: _Optional[str] = ...) -> None: ...
