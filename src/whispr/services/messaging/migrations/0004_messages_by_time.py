"""Messages by the time they were sent, for reports over days."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    # A few bytes for each megabyte of messages, because they lie in the order in which they were sent.
    op.execute("CREATE INDEX messages_by_time ON messages USING brin (sent_at) WITH (autosummarize = on)")


def downgrade() -> None:
    op.execute("DROP INDEX messages_by_time")
