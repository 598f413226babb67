from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MediaLink(_message.Message):
    __slots__ = ("message_id", "conversation_id", "sender_id", "media_ids")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_ID_FIELD_NUMBER: _ClassVar[int]
    MEDIA_IDS_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    conversation_id: str
    sender_id: str
    media_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, message_id: _Optional[str] = ..., conversation_id: _Optional[str] = ..., sender_id: _Optional[str] = ..., media_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class LinkMediaRequest(_message.Message):
    __slots__ = ("operation_id", "links", "unlinks")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    UNLINKS_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    links: _containers.RepeatedCompositeFieldContainer[MediaLink]
    unlinks: _containers.RepeatedCompositeFieldContainer[MediaLink]
    def __init__(self, operation_id: _Optional[str] = ..., links: _Optional[_Iterable[_Union[MediaLink, _Mapping]]] = ..., unlinks: _Optional[_Iterable[_Union[MediaLink, _Mapping]]] = ...) -> None: ...

class LinkMediaResponse(_message.Message):
    __slots__ = ("linked", "unlinked")
    LINKED_FIELD_NUMBER: _ClassVar[int]
    UNLINKED_FIELD_NUMBER: _ClassVar[int]
    linked: int
    unlinked: int
    def __init__(self, linked: _Optional[int] = ..., unlinked: _Optional[int] = ...) -> None: ...
