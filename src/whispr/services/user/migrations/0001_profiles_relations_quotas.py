"""Profiles, contacts, blocks, quotas, and the ledger of operations that may be repeated."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE profiles (
            user_id uuid PRIMARY KEY,
            state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'dormant', 'erased')),
            username text,
            display_name text,
            avatar_media_id uuid,
            locale text NOT NULL DEFAULT 'en',
            time_zone text NOT NULL DEFAULT 'UTC',
            privacy jsonb NOT NULL DEFAULT '{}',
            created_at timestamptz NOT NULL,
            updated_at timestamptz NOT NULL,
            last_active_at timestamptz NOT NULL,
            CHECK ((username IS NULL) = (state = 'erased'))
        );
        CREATE INDEX profiles_username ON profiles (username) WHERE username IS NOT NULL;
        CREATE INDEX profiles_last_active ON profiles (last_active_at) WHERE state = 'active';

        CREATE TABLE contacts (
            owner_id uuid NOT NULL REFERENCES profiles (user_id),
            user_id uuid NOT NULL REFERENCES profiles (user_id),
            created_at timestamptz NOT NULL,
            PRIMARY KEY (owner_id, user_id),
            CHECK (owner_id <> user_id)
        );
        CREATE INDEX contacts_in_order ON contacts (owner_id, created_at, user_id);
        CREATE INDEX contacts_reverse ON contacts (user_id);

        CREATE TABLE blocks (
            owner_id uuid NOT NULL REFERENCES profiles (user_id),
            user_id uuid NOT NULL REFERENCES profiles (user_id),
            created_at timestamptz NOT NULL,
            PRIMARY KEY (owner_id, user_id),
            CHECK (owner_id <> user_id)
        );
        CREATE INDEX blocks_in_order ON blocks (owner_id, created_at, user_id);
        CREATE INDEX blocks_reverse ON blocks (user_id);

        CREATE TABLE quotas (
            user_id uuid PRIMARY KEY REFERENCES profiles (user_id),
            storage_limit_bytes bigint CHECK (storage_limit_bytes >= 0),
            storage_used_bytes bigint NOT NULL DEFAULT 0 CHECK (storage_used_bytes >= 0),
            storage_reserved_bytes bigint NOT NULL DEFAULT 0 CHECK (storage_reserved_bytes >= 0)
        );
        COMMENT ON COLUMN quotas.storage_limit_bytes IS 'NULL: the limit from the settings';

        CREATE TABLE storage_reservations (
            reservation_id uuid PRIMARY KEY,
            user_id uuid NOT NULL REFERENCES profiles (user_id),
            bytes bigint NOT NULL CHECK (bytes >= 0),
            state text NOT NULL CHECK (state IN ('reserved', 'committed', 'released', 'expired')),
            expires_at timestamptz NOT NULL,
            updated_at timestamptz NOT NULL
        );
        CREATE INDEX storage_reservations_user ON storage_reservations (user_id);
        CREATE INDEX storage_reservations_due ON storage_reservations (expires_at) WHERE state = 'reserved';
        CREATE INDEX storage_reservations_settled ON storage_reservations (updated_at) WHERE state <> 'reserved';

        CREATE TABLE operations (
            operation_id uuid PRIMARY KEY,
            request jsonb NOT NULL,
            response jsonb,
            created_at timestamptz NOT NULL
        );
        CREATE INDEX operations_age ON operations (created_at);
        """
    )


def downgrade() -> None:
    op.execute(
        """
        DROP TABLE operations;
        DROP TABLE storage_reservations;
        DROP TABLE quotas;
        DROP TABLE blocks;
        DROP TABLE contacts;
        DROP TABLE profiles;
        """
    )
