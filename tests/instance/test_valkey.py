"""The embedded Valkey."""

import os
import signal
from pathlib import Path

import pytest
import redis

from whispr.instance.valkey import EmbeddedValkey


def test_it_answers_only_with_the_password_and_keeps_nothing_on_disk(open_folder: Path) -> None:
    server = EmbeddedValkey(open_folder / "vk").start()
    try:
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
            assert client.config_get("save") == {"save": ""}
        with (
            redis.Redis(port=server.port, password="wrong") as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.get("key")
        assert server.pid is not None
        assert server.password not in Path(f"/proc/{server.pid}/cmdline").read_text()
    finally:
        server.stop()
    assert [path.name for path in (open_folder / "vk").iterdir()] == ["valkey.log"]


def test_killed_it_comes_back_at_the_same_address(open_folder: Path) -> None:
    server = EmbeddedValkey(open_folder / "vk").start()
    try:
        url, pid = server.url, server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        server.start()
        assert server.url == url
        with redis.Redis.from_url(url) as client:
            assert client.ping()
    finally:
        server.stop()
