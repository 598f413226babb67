"""Every SQL statement of an instance: a role and a database per service."""

import psycopg
from psycopg import sql


def server_version(connection: psycopg.Connection) -> int:
    """The server's version as a number, 180006 for 18.6."""
    row = connection.execute("SELECT current_setting('server_version_num')::int").fetchone()
    return int(row[0]) if row else 0


def role_exists(connection: psycopg.Connection, role: str) -> bool:
    return connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone() is not None


def create_role(connection: psycopg.Connection, role: str, password: str) -> None:
    connection.execute(
        sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(password))
    )


def change_password(connection: psycopg.Connection, role: str, password: str) -> None:
    connection.execute(
        sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(password))
    )


def database_exists(connection: psycopg.Connection, database: str) -> bool:
    return (
        connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone() is not None
    )


def grant_membership(connection: psycopg.Connection, role: str) -> None:
    """Lets an administrator that is no superuser make a database for `role`."""
    connection.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(sql.Identifier(role)))


def create_database(connection: psycopg.Connection, database: str, owner: str) -> None:
    """A database only its owner may enter: services read each other through gRPC, never through tables."""
    connection.execute(
        sql.SQL("CREATE DATABASE {} OWNER {} ENCODING 'UTF8' TEMPLATE template0").format(
            sql.Identifier(database), sql.Identifier(owner)
        )
    )
    connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(database)))
