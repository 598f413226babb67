"""Changes of messages, reactions, pins, media, expiry, scheduled messages, reports and permissions."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision: str | None = "0001"

SCHEMA = """
ALTER TABLE conversations
    ADD COLUMN permissions       jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN retention_seconds integer CHECK (retention_seconds > 0),
    ADD COLUMN purged_seq        bigint NOT NULL DEFAULT 0;
CREATE INDEX conversations_with_retention ON conversations (id) WHERE retention_seconds IS NOT NULL;

-- draft_sha256: of the content as it was first sent, once content_sha256 is that of an edit. Null while they are the same.
ALTER TABLE messages
    ADD COLUMN draft_sha256      bytea,
    ADD COLUMN edited_device_id  uuid,
    ADD COLUMN expires_from_read boolean NOT NULL DEFAULT false,
    ADD COLUMN expires_at        timestamptz;
CREATE INDEX messages_by_expiry ON messages (expires_at) WHERE expires_at IS NOT NULL AND NOT is_deleted;
CREATE INDEX messages_awaiting_readers ON messages (conversation_id, seq)
    WHERE expires_from_read AND expires_at IS NULL AND NOT is_deleted;

CREATE TABLE message_reactions (
    conversation_id uuid NOT NULL,
    message_id      uuid NOT NULL,
    user_id         uuid NOT NULL,
    reaction        text NOT NULL,
    seq             bigint NOT NULL,
    created_at      timestamptz NOT NULL,
    PRIMARY KEY (conversation_id, message_id, user_id, reaction)
);

CREATE TABLE message_pins (
    conversation_id uuid NOT NULL,
    message_id      uuid NOT NULL,
    pinned_by       uuid NOT NULL,
    pinned_at       timestamptz NOT NULL,
    PRIMARY KEY (conversation_id, message_id)
);

CREATE TABLE message_media (
    media_id        uuid NOT NULL,
    conversation_id uuid NOT NULL,
    message_id      uuid NOT NULL,
    sender_id       uuid NOT NULL,
    seq             bigint NOT NULL,
    PRIMARY KEY (media_id, conversation_id, message_id)
);
CREATE INDEX message_media_by_message ON message_media (conversation_id, message_id);

CREATE TABLE scheduled_messages (
    id                uuid PRIMARY KEY,
    conversation_id   uuid NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    sender_id         uuid NOT NULL,
    sender_device_id  uuid NOT NULL,
    client_id         uuid NOT NULL,
    message_type      text NOT NULL CHECK (message_type IN ('text', 'media', 'system')),
    content           bytea NOT NULL,
    content_sha256    bytea NOT NULL,
    signature         bytea NOT NULL,
    reply_to_id       uuid,
    media_ids         uuid[],
    expires_in        integer,
    expires_from_read boolean NOT NULL DEFAULT false,
    send_at           timestamptz NOT NULL,
    status            text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'sent', 'needs_reencrypt', 'failed', 'cancelled')),
    failure           text,
    message_id        uuid,
    due_at            timestamptz NOT NULL,
    attempts          integer NOT NULL DEFAULT 0,
    version           integer NOT NULL DEFAULT 1,
    created_at        timestamptz NOT NULL,
    updated_at        timestamptz NOT NULL,
    UNIQUE (conversation_id, sender_device_id, client_id)
);
CREATE INDEX scheduled_messages_due ON scheduled_messages (due_at) WHERE status = 'pending';
CREATE INDEX scheduled_messages_by_sender ON scheduled_messages (sender_id, send_at);

CREATE TABLE message_reports (
    id              uuid PRIMARY KEY,
    conversation_id uuid NOT NULL,
    message_id      uuid NOT NULL,
    reporter_id     uuid NOT NULL,
    reported_id     uuid NOT NULL,
    reason          text NOT NULL,
    comment         text,
    plaintext       bytea,
    is_verified     boolean NOT NULL,
    created_at      timestamptz NOT NULL,
    UNIQUE (message_id, reporter_id)
);

CREATE TABLE sender_restrictions (
    user_id    uuid PRIMARY KEY,
    reason     text NOT NULL,
    until      timestamptz NOT NULL,
    created_at timestamptz NOT NULL
);
"""


def upgrade() -> None:
    op.execute(SCHEMA)


def downgrade() -> None:
    op.execute(
        "DROP TABLE sender_restrictions, message_reports, scheduled_messages, message_media, message_pins,"
        " message_reactions;"
        " DROP INDEX messages_awaiting_readers, messages_by_expiry, conversations_with_retention;"
        " ALTER TABLE messages DROP COLUMN expires_at, DROP COLUMN expires_from_read, DROP COLUMN edited_device_id,"
        " DROP COLUMN draft_sha256;"
        " ALTER TABLE conversations DROP COLUMN purged_seq, DROP COLUMN retention_seconds, DROP COLUMN permissions"
    )
