import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetProfilesRequest(_message.Message):
    __slots__ = ("user_ids",)
    USER_IDS_FIELD_NUMBER: _ClassVar[int]
    user_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, user_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("user_id", "username", "display_name", "avatar_media_id", "locale", "time_zone", "read_receipts")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    AVATAR_MEDIA_ID_FIELD_NUMBER: _ClassVar[int]
    LOCALE_FIELD_NUMBER: _ClassVar[int]
    TIME_ZONE_FIELD_NUMBER: _ClassVar[int]
    READ_RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    username: str
    display_name: str
    avatar_media_id: str
    locale: str
    time_zone: str
    read_receipts: bool
    def __init__(self, user_id: _Optional[str] = ..., username: _Optional[str] = ..., display_name: _Optional[str] = ..., avatar_media_id: _Optional[str] = ..., locale: _Optional[str] = ..., time_zone: _Optional[str] = ..., read_receipts: _Optional[bool] = ...) -> None: ...

class GetProfilesResponse(_message.Message):
    __slots__ = ("profiles",)
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    profiles: _containers.RepeatedCompositeFieldContainer[Profile]
    def __init__(self, profiles: _Optional[_Iterable[_Union[Profile, _Mapping]]] = ...) -> None: ...

class ContactPair(_message.Message):
    __slots__ = ("sender_id", "recipient_id")
    SENDER_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_ID_FIELD_NUMBER: _ClassVar[int]
    sender_id: str
    recipient_id: str
    def __init__(self, sender_id: _Optional[str] = ..., recipient_id: _Optional[str] = ...) -> None: ...

class CheckContactabilityRequest(_message.Message):
    __slots__ = ("sender_id", "recipient_ids", "purpose", "pairs")
    SENDER_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_IDS_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    sender_id: str
    recipient_ids: _containers.RepeatedScalarFieldContainer[str]
    purpose: str
    pairs: _containers.RepeatedCompositeFieldContainer[ContactPair]
    def __init__(self, sender_id: _Optional[str] = ..., recipient_ids: _Optional[_Iterable[str]] = ..., purpose: _Optional[str] = ..., pairs: _Optional[_Iterable[_Union[ContactPair, _Mapping]]] = ...) -> None: ...

class Contactability(_message.Message):
    __slots__ = ("user_id", "exists", "allowed", "reason", "knows_sender")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    EXISTS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KNOWS_SENDER_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    exists: bool
    allowed: bool
    reason: str
    knows_sender: bool
    def __init__(self, user_id: _Optional[str] = ..., exists: _Optional[bool] = ..., allowed: _Optional[bool] = ..., reason: _Optional[str] = ..., knows_sender: _Optional[bool] = ...) -> None: ...

class CheckContactabilityResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Contactability]
    def __init__(self, results: _Optional[_Iterable[_Union[Contactability, _Mapping]]] = ...) -> None: ...

class PresenceQuestion(_message.Message):
    __slots__ = ("viewer_id", "subject_ids")
    VIEWER_ID_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_IDS_FIELD_NUMBER: _ClassVar[int]
    viewer_id: str
    subject_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, viewer_id: _Optional[str] = ..., subject_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GetPresenceVisibilityRequest(_message.Message):
    __slots__ = ("questions",)
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    questions: _containers.RepeatedCompositeFieldContainer[PresenceQuestion]
    def __init__(self, questions: _Optional[_Iterable[_Union[PresenceQuestion, _Mapping]]] = ...) -> None: ...

class PresenceVisibility(_message.Message):
    __slots__ = ("user_id", "online", "last_seen")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    online: bool
    last_seen: bool
    def __init__(self, user_id: _Optional[str] = ..., online: _Optional[bool] = ..., last_seen: _Optional[bool] = ...) -> None: ...

class PresenceAnswer(_message.Message):
    __slots__ = ("subjects",)
    SUBJECTS_FIELD_NUMBER: _ClassVar[int]
    subjects: _containers.RepeatedCompositeFieldContainer[PresenceVisibility]
    def __init__(self, subjects: _Optional[_Iterable[_Union[PresenceVisibility, _Mapping]]] = ...) -> None: ...

class GetPresenceVisibilityResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[PresenceAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[PresenceAnswer, _Mapping]]] = ...) -> None: ...

class GetUserQuotasRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    def __init__(self, user_id: _Optional[str] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("resource", "limit", "used", "reserved")
    RESOURCE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    resource: str
    limit: int
    used: int
    reserved: int
    def __init__(self, resource: _Optional[str] = ..., limit: _Optional[int] = ..., used: _Optional[int] = ..., reserved: _Optional[int] = ...) -> None: ...

class GetUserQuotasResponse(_message.Message):
    __slots__ = ("quotas",)
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    quotas: _containers.RepeatedCompositeFieldContainer[Quota]
    def __init__(self, quotas: _Optional[_Iterable[_Union[Quota, _Mapping]]] = ...) -> None: ...

class UpdateStorageUsageRequest(_message.Message):
    __slots__ = ("operation_id", "user_id", "action", "bytes", "reservation_id")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    user_id: str
    action: str
    bytes: int
    reservation_id: str
    def __init__(self, operation_id: _Optional[str] = ..., user_id: _Optional[str] = ..., action: _Optional[str] = ..., bytes: _Optional[int] = ..., reservation_id: _Optional[str] = ...) -> None: ...

class UpdateStorageUsageResponse(_message.Message):
    __slots__ = ("limit", "used", "reserved")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    limit: int
    used: int
    reserved: int
    def __init__(self, limit: _Optional[int] = ..., used: _Optional[int] = ..., reserved: _Optional[int] = ...) -> None: ...

class EraseUserRequest(_message.Message):
    __slots__ = ("operation_id", "user_id")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    user_id: str
    def __init__(self, operation_id: _Optional[str] = ..., user_id: _Optional[str] = ...) -> None: ...

class EraseUserResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GenerateActivityReportRequest(_message.Message):
    __slots__ = ("operation_id", "until")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    until: _timestamp_pb2.Timestamp
    def __init__(self, operation_id: _Optional[str] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., **kwargs) -> None: ...

class GenerateActivityReportResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: str
    def __init__(self, report: _Optional[str] = ...) -> None: ...

class CleanupInactiveUsersRequest(_message.Message):
    __slots__ = ("operation_id", "inactive_since", "dry_run", "limit")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    INACTIVE_SINCE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    inactive_since: _timestamp_pb2.Timestamp
    dry_run: bool
    limit: int
    def __init__(self, operation_id: _Optional[str] = ..., inactive_since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., dry_run: _Optional[bool] = ..., limit: _Optional[int] = ...) -> None: ...

class CleanupInactiveUsersResponse(_message.Message):
    __slots__ = ("affected",)
    AFFECTED_FIELD_NUMBER: _ClassVar[int]
    affected: int
    def __init__(self, affected: _Optional[int] = ...) -> None: ...
