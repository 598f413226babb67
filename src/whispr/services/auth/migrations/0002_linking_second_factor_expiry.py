"""Linking of devices, second factors, and devices that expire."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute(
        """
        -- Set beside revoked_at on a device that was away for too long: the client is told to link anew.
        ALTER TABLE devices ADD COLUMN expired_at timestamptz,
            ADD CONSTRAINT devices_expired_are_revoked CHECK (expired_at IS NULL OR status = 'revoked');
        CREATE INDEX devices_by_last_seen ON devices (last_seen_day, account_id) WHERE status = 'active';
        CREATE INDEX sessions_by_revocation ON sessions (revoked_at) WHERE revoked_at IS NOT NULL;

        CREATE TABLE device_links (
            id uuid PRIMARY KEY,
            account_id uuid NOT NULL REFERENCES accounts,
            -- Who began it. No foreign keys: the history outlives sessions.
            by_device_id uuid NOT NULL,
            by_session_id uuid NOT NULL,
            token_digest bytea NOT NULL UNIQUE,
            -- For a repeat with the same Idempotency-Key, which alone opens the token.
            request_digest bytea,
            token_sealed bytea,
            status text NOT NULL CHECK (
                status IN ('waiting', 'claimed', 'confirmed', 'finished', 'expired', 'refused')
            ),
            created_at timestamptz NOT NULL,
            -- The end of the present step.
            expires_at timestamptz NOT NULL,
            -- What the new device brought, until it is a device.
            device jsonb,
            check_code text,
            wrong_confirms integer NOT NULL DEFAULT 0,
            device_id uuid,
            session_id uuid,
            CHECK (status NOT IN ('claimed', 'confirmed') OR (device IS NOT NULL AND check_code IS NOT NULL)),
            CHECK ((request_digest IS NULL) = (token_sealed IS NULL)),
            CHECK ((status = 'finished') = (device_id IS NOT NULL AND session_id IS NOT NULL))
        );
        CREATE INDEX device_links_by_account ON device_links (account_id, id);
        CREATE INDEX device_links_by_age ON device_links (created_at);
        CREATE INDEX device_links_open ON device_links (expires_at)
            WHERE status IN ('waiting', 'claimed', 'confirmed');

        CREATE TABLE second_factors (
            account_id uuid PRIMARY KEY REFERENCES accounts,
            data_key_id text NOT NULL REFERENCES data_keys,
            nonce bytea NOT NULL,
            ciphertext bytea NOT NULL,
            created_at timestamptz NOT NULL,
            -- Asked for only from here on.
            confirmed_at timestamptz,
            -- The time step of the newest code that was accepted: neither it nor an older one is good again.
            last_step bigint NOT NULL DEFAULT 0,
            failures integer NOT NULL DEFAULT 0,
            locked_until timestamptz,
            -- Of the request that made the secret, for its repeats.
            request_digest bytea
        );
        CREATE INDEX second_factors_by_data_key ON second_factors (data_key_id);

        CREATE TABLE recovery_codes (
            account_id uuid NOT NULL REFERENCES second_factors ON DELETE CASCADE,
            digest bytea NOT NULL,
            PRIMARY KEY (account_id, digest)
        );
        """
    )


def downgrade() -> None:
    op.execute(
        """
        DROP TABLE recovery_codes, second_factors, device_links;
        DROP INDEX sessions_by_revocation, devices_by_last_seen;
        ALTER TABLE devices DROP COLUMN expired_at;
        """
    )
