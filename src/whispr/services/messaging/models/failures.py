"""What messaging tells a caller went wrong."""

from __future__ import annotations

from whispr.kit.errors import Failure, Kind


class NotAMember(Failure):
    """The conversation does not exist or you are not in it."""

    kind = Kind.FORBIDDEN
    code = "forbidden"


class ConversationNotFound(Failure):
    """There is no such conversation."""

    kind = Kind.NOT_FOUND
    code = "conversation_not_found"


class MessageNotFound(Failure):
    """There is no such message."""

    kind = Kind.NOT_FOUND
    code = "message_not_found"


class MessageDeleted(Failure):
    """The message was deleted."""

    kind = Kind.CONFLICT
    code = "message_deleted"


class InvalidReaction(Failure):
    """A reaction is 1 to 64 characters of text."""

    kind = Kind.INVALID
    code = "invalid_reaction"


class TooManyReactions(Failure):
    """A message has at most 20 different reactions, 5 of one person."""

    kind = Kind.CONFLICT
    code = "too_many_reactions"


class TooManyPins(Failure):
    """A conversation has at most 100 pinned messages."""

    kind = Kind.CONFLICT
    code = "too_many_pins"


class MemberNotFound(Failure):
    """This person is not in the conversation."""

    kind = Kind.NOT_FOUND
    code = "member_not_found"


class UnknownUser(Failure):
    """There is no such person. `user_ids` lists who."""

    kind = Kind.NOT_FOUND
    code = "user_not_found"


class NotAllowed(Failure):
    """Your role does not allow this."""

    kind = Kind.FORBIDDEN
    code = "not_allowed"


class Blocked(Failure):
    """One of you has blocked the other."""

    kind = Kind.FORBIDDEN
    code = "blocked"


class ContactsOnly(Failure):
    """This person accepts this only from contacts."""

    kind = Kind.FORBIDDEN
    code = "contacts_only"


class ConversationClosed(Failure):
    """The conversation is closed."""

    kind = Kind.CONFLICT
    code = "conversation_closed"


class NotAGroup(Failure):
    """A direct conversation has no roles and its two members do not change."""

    kind = Kind.CONFLICT
    code = "not_a_group"


class TooManyMembers(Failure):
    """A group has at most 1,000 members."""

    kind = Kind.CONFLICT
    code = "too_many_members"


class IdempotencyConflict(Failure):
    """This Idempotency-Key was used for another conversation."""

    kind = Kind.CONFLICT
    code = "idempotency_conflict"


class ClientIdConflict(Failure):
    """This client_id was used for another message."""

    kind = Kind.CONFLICT
    code = "client_id_conflict"


class DevicesMismatch(Failure):
    """The envelopes are not for exactly the members' current devices."""

    kind = Kind.CONFLICT
    code = "devices_mismatch"


class InvalidMembers(Failure):
    """These members do not make such a conversation."""

    kind = Kind.INVALID
    code = "invalid_members"


class InvalidDocument(Failure):
    """The object cannot be stored: it is nested too deep, or holds a NUL or a number that is none."""

    kind = Kind.INVALID
    code = "invalid_metadata"


class DocumentTooLarge(Failure):
    """Metadata and settings are at most 8 KiB each."""

    kind = Kind.TOO_LARGE
    code = "too_large"


class InvalidMessageType(Failure):
    """A message is `text`, `media` or `system`."""

    kind = Kind.INVALID
    code = "invalid_message_type"


class ReplyNotFound(Failure):
    """The message replied to is not in this conversation, or not for you to see."""

    kind = Kind.INVALID
    code = "reply_not_found"


class InvalidContent(Failure):
    """Content is either a ciphertext or envelopes, in base64."""

    kind = Kind.INVALID
    code = "invalid_content"


class BadSignature(Failure):
    """The signature does not match."""

    kind = Kind.INVALID
    code = "bad_signature"


class UnknownEvent(Failure):
    """This channel has no such event."""

    kind = Kind.INVALID
    code = "unknown_event"


class ContentTooLarge(Failure):
    """A message's content is at most 96 KiB."""

    kind = Kind.TOO_LARGE
    code = "too_large"


class Rescheduled(Failure):
    """The scheduled message is not what it was when it was read."""

    kind = Kind.CONFLICT
    code = "rescheduled"


class InvalidSendAt(Failure):
    """A message is scheduled for a time between now and a year from now."""

    kind = Kind.INVALID
    code = "invalid_send_at"


class TooManyScheduled(Failure):
    """A person has at most 100 scheduled messages that are not sent."""

    kind = Kind.CONFLICT
    code = "too_many_scheduled"


class ScheduledNotFound(Failure):
    """You have no such scheduled message."""

    kind = Kind.NOT_FOUND
    code = "scheduled_not_found"


class AlreadySent(Failure):
    """The message was sent already."""

    kind = Kind.CONFLICT
    code = "already_sent"


class NotPending(Failure):
    """The scheduled message was cancelled, or it failed."""

    kind = Kind.CONFLICT
    code = "not_pending"
