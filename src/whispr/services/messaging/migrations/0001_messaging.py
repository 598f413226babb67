"""Conversations, members, messages, events, receipts and cursors."""

from __future__ import annotations

from alembic import op

from whispr.kit import outbox

revision = "0001"
down_revision: str | None = None

PARTITIONS = 16

SCHEMA = """
CREATE TABLE incarnation (
    one   boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO incarnation DEFAULT VALUES;

-- The clients' own objects are json, not jsonb: nothing here looks into them, and jsonb would write 1e300 out as 301
-- digits, no longer the number that was stored.
CREATE TABLE conversations (
    id              uuid PRIMARY KEY,
    type            text NOT NULL CHECK (type IN ('direct', 'group')),
    metadata        json NOT NULL DEFAULT '{}',
    is_active       boolean NOT NULL DEFAULT true,
    created_by      uuid NOT NULL,
    direct_key      text UNIQUE,
    creation_key    text UNIQUE,
    creation_digest bytea,
    last_seq        bigint NOT NULL DEFAULT 0,
    created_at      timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL,
    CHECK ((type = 'direct') = (direct_key IS NOT NULL))
-- Every message updates last_seq and updated_at, neither indexed: room on the page keeps these updates heap-only.
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);

CREATE TABLE conversation_members (
    conversation_id uuid NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    user_id         uuid NOT NULL,
    role            text NOT NULL CHECK (role IN ('owner', 'admin', 'member')),
    settings        json NOT NULL DEFAULT '{}',
    joined_at       timestamptz NOT NULL,
    floor_seq       bigint NOT NULL DEFAULT 0,
    is_active       boolean NOT NULL DEFAULT true,
    left_at         timestamptz,
    left_seq        bigint,
    hidden_seq      bigint,
    delivered_seq   bigint NOT NULL DEFAULT 0,
    read_seq        bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (conversation_id, user_id),
    CHECK (is_active = (left_seq IS NULL))
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX conversation_members_by_user ON conversation_members (user_id) WHERE is_active;

-- No foreign key from the two logs to conversations: their writers hold the conversation's row lock, so the check could
-- never fail, and it would cost every message a trigger.
CREATE TABLE messages (
    conversation_id  uuid NOT NULL,
    seq              bigint NOT NULL,
    id               uuid NOT NULL,
    sender_id        uuid NOT NULL,
    sender_device_id uuid NOT NULL,
    client_id        uuid NOT NULL,
    message_type     text NOT NULL CHECK (message_type IN ('text', 'media', 'system')),
    content          bytea NOT NULL,
    content_sha256   bytea NOT NULL,
    signature        bytea NOT NULL,
    reply_to_id      uuid,
    media_ids        uuid[],
    metadata         jsonb,
    expires_in       integer,
    sent_at          timestamptz NOT NULL,
    edited_at        timestamptz,
    is_deleted       boolean NOT NULL DEFAULT false,
    PRIMARY KEY (conversation_id, seq),
    UNIQUE (conversation_id, sender_device_id, client_id)
) PARTITION BY HASH (conversation_id);
CREATE INDEX messages_by_id ON messages (id);

CREATE TABLE conversation_events (
    conversation_id uuid NOT NULL,
    seq             bigint NOT NULL,
    event           text NOT NULL,
    payload         bytea NOT NULL,
    created_at      timestamptz NOT NULL,
    PRIMARY KEY (conversation_id, seq)
) PARTITION BY HASH (conversation_id);

-- One row for each move of a watermark: a message was delivered to a person with the first row at or past its seq.
CREATE TABLE receipt_marks (
    conversation_id uuid NOT NULL,
    user_id         uuid NOT NULL,
    kind            smallint NOT NULL CHECK (kind IN (1, 2)),
    seq             bigint NOT NULL,
    at              timestamptz NOT NULL,
    PRIMARY KEY (conversation_id, user_id, kind, seq)
);
CREATE INDEX receipt_marks_by_time ON receipt_marks USING brin (at);

CREATE TABLE device_cursors (
    device_id       uuid NOT NULL,
    conversation_id uuid NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    user_id         uuid NOT NULL,
    delivered_seq   bigint NOT NULL,
    updated_at      timestamptz NOT NULL,
    PRIMARY KEY (device_id, conversation_id)
) WITH (fillfactor = 80);
CREATE INDEX device_cursors_by_user ON device_cursors (user_id);
"""


def upgrade() -> None:
    op.execute(SCHEMA)
    for number in range(PARTITIONS):
        op.execute(
            f"CREATE TABLE messages_{number:02} PARTITION OF messages"
            f" FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {number});"
            f"CREATE TABLE conversation_events_{number:02} PARTITION OF conversation_events"
            f" FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {number});"
        )
    op.execute(outbox.SCHEMA)


def downgrade() -> None:
    op.execute(outbox.DROP)
    op.execute(
        "DROP TABLE device_cursors, receipt_marks, conversation_events, messages, conversation_members,"
        " conversations, incarnation"
    )
