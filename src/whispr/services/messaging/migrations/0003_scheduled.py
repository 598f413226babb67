"""What a scheduled message lacks before it can be sent, and the ways in which they are looked for."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision: str | None = "0002"

SCHEMA = """
-- needs: which devices the envelopes were not for, as the author's devices are told.
ALTER TABLE scheduled_messages ADD COLUMN needs jsonb;
CREATE INDEX scheduled_messages_in_line ON scheduled_messages (conversation_id, send_at, id) WHERE status = 'pending';
CREATE INDEX scheduled_messages_in_need ON scheduled_messages (sender_id) WHERE status = 'needs_reencrypt';
CREATE INDEX scheduled_messages_settled ON scheduled_messages (updated_at)
    WHERE status IN ('sent', 'failed', 'cancelled');
DROP INDEX scheduled_messages_by_sender;
CREATE INDEX scheduled_messages_by_sender ON scheduled_messages (sender_id, send_at, id);
"""


def upgrade() -> None:
    op.execute(SCHEMA)


def downgrade() -> None:
    op.execute(
        "DROP INDEX scheduled_messages_by_sender, scheduled_messages_settled, scheduled_messages_in_need,"
        " scheduled_messages_in_line;"
        " CREATE INDEX scheduled_messages_by_sender ON scheduled_messages (sender_id, send_at);"
        " ALTER TABLE scheduled_messages DROP COLUMN needs"
    )
