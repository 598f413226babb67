"""Accounts, devices, sessions, prekeys, push tokens, keys and the audit trail."""

from alembic import op

from whispr.kit import outbox

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(outbox.SCHEMA)
    op.execute(
        """
        CREATE TABLE accounts (
            id uuid PRIMARY KEY,
            username text UNIQUE CHECK (username ~ '^[a-z0-9_.]{3,32}$'),
            password_hash text,
            status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'deleted')),
            device_list_epoch bigint NOT NULL DEFAULT 0,
            created_at timestamptz NOT NULL,
            password_changed_at timestamptz NOT NULL,
            deleted_at timestamptz,
            CHECK ((status = 'deleted') = (username IS NULL AND password_hash IS NULL AND deleted_at IS NOT NULL))
        );

        -- Names of deleted accounts stay taken, so that nobody can pose as the person who left. Only a digest is kept.
        CREATE TABLE retired_usernames (
            digest bytea PRIMARY KEY,
            retired_at timestamptz NOT NULL
        );

        CREATE TABLE account_roles (
            account_id uuid NOT NULL REFERENCES accounts ON DELETE CASCADE,
            role text NOT NULL CHECK (role IN ('admin', 'moderator')),
            granted_at timestamptz NOT NULL,
            PRIMARY KEY (account_id, role)
        );

        CREATE TABLE devices (
            id uuid PRIMARY KEY,
            account_id uuid NOT NULL REFERENCES accounts,
            name text NOT NULL,
            platform text NOT NULL CHECK (platform IN ('ios', 'android', 'web', 'desktop')),
            registration_id integer NOT NULL CHECK (registration_id BETWEEN 1 AND 16380),
            identity_key bytea NOT NULL CHECK (octet_length(identity_key) = 32),
            signing_key bytea NOT NULL CHECK (octet_length(signing_key) = 32),
            status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'revoked')),
            created_at timestamptz NOT NULL,
            revoked_at timestamptz,
            last_seen_day date NOT NULL,
            ec_prekeys_low boolean NOT NULL DEFAULT false,
            pq_prekeys_low boolean NOT NULL DEFAULT false,
            CHECK ((status = 'revoked') = (revoked_at IS NOT NULL))
        );
        CREATE INDEX devices_active ON devices (account_id, id) WHERE status = 'active';
        CREATE INDEX devices_account ON devices (account_id);

        CREATE TABLE sessions (
            id uuid PRIMARY KEY,
            account_id uuid NOT NULL REFERENCES accounts ON DELETE CASCADE,
            device_id uuid NOT NULL REFERENCES devices ON DELETE CASCADE,
            -- Proves that a refresh token was once issued in this family, long after its own row is gone. Whoever
            -- steals it can end the session and no more.
            family_key bytea NOT NULL,
            created_at timestamptz NOT NULL,
            last_used_at timestamptz NOT NULL,
            expires_at timestamptz NOT NULL,
            revoked_at timestamptz,
            revoke_reason text
        );
        CREATE INDEX sessions_live_by_account ON sessions (account_id, id) WHERE revoked_at IS NULL;
        CREATE INDEX sessions_by_device ON sessions (device_id);
        CREATE INDEX sessions_by_account ON sessions (account_id);
        CREATE INDEX sessions_by_expiry ON sessions (expires_at);

        CREATE TABLE refresh_tokens (
            digest bytea PRIMARY KEY,
            session_id uuid NOT NULL REFERENCES sessions ON DELETE CASCADE,
            issued_at timestamptz NOT NULL,
            expires_at timestamptz NOT NULL,
            used_at timestamptz,
            -- The successor, readable only with the token of this row, which is not stored.
            successor_digest bytea,
            successor_sealed bytea,
            CHECK ((used_at IS NULL) = (successor_digest IS NULL))
        );
        CREATE INDEX refresh_tokens_by_session ON refresh_tokens (session_id);
        CREATE INDEX refresh_tokens_used ON refresh_tokens (used_at) WHERE used_at IS NOT NULL;

        -- Which session an Idempotency-Key of register or login has made.
        CREATE TABLE idempotency_keys (
            username text NOT NULL,
            key_digest bytea NOT NULL,
            request_digest bytea NOT NULL,
            session_id uuid NOT NULL REFERENCES sessions ON DELETE CASCADE,
            created_at timestamptz NOT NULL,
            PRIMARY KEY (username, key_digest)
        );
        CREATE INDEX idempotency_keys_by_session ON idempotency_keys (session_id);
        CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

        -- Kept as long as an access token from before the revocation could still be valid.
        CREATE TABLE revocations (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            subject text NOT NULL CHECK (subject IN ('session', 'device', 'user')),
            subject_id uuid NOT NULL,
            at timestamptz NOT NULL
        );
        CREATE INDEX revocations_by_time ON revocations (at);
        CREATE INDEX revocations_by_subject ON revocations (subject_id);

        -- Keys that peers may be given again and again.
        CREATE TABLE lasting_prekeys (
            device_id uuid NOT NULL REFERENCES devices ON DELETE CASCADE,
            kind text NOT NULL CHECK (kind IN ('signed', 'pq_last_resort')),
            key_id bigint NOT NULL,
            public_key bytea NOT NULL,
            signature bytea NOT NULL,
            uploaded_at timestamptz NOT NULL,
            PRIMARY KEY (device_id, kind)
        );

        CREATE TABLE one_time_prekeys (
            device_id uuid NOT NULL REFERENCES devices ON DELETE CASCADE,
            kind text NOT NULL CHECK (kind IN ('ec', 'pq')),
            key_id bigint NOT NULL,
            public_key bytea NOT NULL,
            signature bytea,
            digest bytea NOT NULL,
            position bigint GENERATED ALWAYS AS IDENTITY,
            PRIMARY KEY (device_id, kind, key_id),
            UNIQUE (device_id, digest)
        );
        CREATE INDEX one_time_prekeys_in_order ON one_time_prekeys (device_id, kind, position);

        -- A repeated upload must not bring back a key that was handed out in between.
        CREATE TABLE spent_prekeys (
            device_id uuid NOT NULL REFERENCES devices ON DELETE CASCADE,
            digest bytea NOT NULL,
            spent_at timestamptz NOT NULL,
            PRIMARY KEY (device_id, digest)
        );
        CREATE INDEX spent_prekeys_by_age ON spent_prekeys (spent_at);

        -- Data keys that encrypt push tokens, themselves sealed under a root key that is never in this database.
        CREATE TABLE data_keys (
            id text PRIMARY KEY,
            root_key_id text NOT NULL,
            sealed bytea NOT NULL,
            created_at timestamptz NOT NULL
        );

        CREATE TABLE push_tokens (
            device_id uuid NOT NULL REFERENCES devices ON DELETE CASCADE,
            channel text NOT NULL CHECK (channel IN ('apns', 'fcm', 'webpush')),
            app_id text NOT NULL,
            environment text NOT NULL CHECK (environment IN ('production', 'sandbox')),
            data_key_id text NOT NULL REFERENCES data_keys,
            nonce bytea NOT NULL,
            ciphertext bytea NOT NULL,
            token_digest bytea NOT NULL,
            status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'inactive')),
            updated_at timestamptz NOT NULL,
            PRIMARY KEY (device_id, channel, app_id),
            UNIQUE (channel, token_digest)
        );
        CREATE INDEX push_tokens_active ON push_tokens (device_id) WHERE status = 'active';
        CREATE INDEX push_tokens_by_data_key ON push_tokens (data_key_id);

        CREATE TABLE signing_keys (
            id text PRIMARY KEY,
            public_key bytea NOT NULL,
            root_key_id text NOT NULL,
            sealed bytea NOT NULL,
            created_at timestamptz NOT NULL,
            active_from timestamptz NOT NULL
        );

        -- Answers of writing RPCs, for repeats with the same operation id.
        CREATE TABLE operations (
            id uuid PRIMARY KEY,
            method text NOT NULL,
            answer jsonb NOT NULL,
            at timestamptz NOT NULL
        );
        CREATE INDEX operations_by_age ON operations (at);

        CREATE TABLE audit_events (
            number bigint PRIMARY KEY,
            at timestamptz NOT NULL,
            event text NOT NULL,
            account_id uuid,
            device_id uuid,
            details jsonb NOT NULL,
            previous_hash bytea NOT NULL,
            hash bytea NOT NULL UNIQUE
        );
        CREATE INDEX audit_events_by_account ON audit_events (account_id, number);

        CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the audit trail is append-only';
        END
        $$;
        CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE ON audit_events
            FOR EACH ROW EXECUTE FUNCTION refuse_audit_change();
        CREATE TRIGGER audit_events_no_truncate BEFORE TRUNCATE ON audit_events
            FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change();
        """
    )


def downgrade() -> None:
    op.execute(
        """
        DROP TABLE audit_events;
        DROP FUNCTION refuse_audit_change();
        DROP TABLE operations, signing_keys, push_tokens, data_keys, spent_prekeys, one_time_prekeys, lasting_prekeys,
            revocations, idempotency_keys, refresh_tokens, sessions, devices, account_roles, retired_usernames, accounts;
        """
    )
    op.execute(outbox.DROP)
