from __future__ import annotations

import pytest
from pydantic_settings import SettingsConfigDict

from whispr.kit.settings import CommonSettings, ServiceSettings, SettingsError, load, split_bind


class ExampleSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="WHISPR_EXAMPLE_")

    workers: int = 1


@pytest.fixture(autouse=True)
def _mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHISPR_MESH", "true")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WHISPR_LOG_LEVEL", "loud"),
        ("WHISPR_HTTP_BIND", "8080"),
        ("WHISPR_GRPC_BIND", "127.0.0.1:70000"),
        ("WHISPR_DATABASE_POOL_SIZE", "many"),
        ("WHISPR_TRACE_SAMPLE_RATIO", "2"),
    ],
)
def test_a_bad_value_stops_the_start_and_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=variable):
        load(CommonSettings)


def test_limits_cannot_be_lifted_in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHISPR_RATE_LIMITS", "off")
    assert load(CommonSettings).rate_limits == "off"
    monkeypatch.setenv("WHISPR_ENVIRONMENT", "production")
    with pytest.raises(SettingsError, match="refused in production"):
        load(CommonSettings)


def test_a_service_without_identity_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHISPR_MESH", "false")
    with pytest.raises(SettingsError, match="WHISPR_IDENTITY_DIR"):
        load(CommonSettings)


def test_a_services_own_options_have_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="WHISPR_EXAMPLE_DATABASE_URL"):
        load(ExampleSettings)
    monkeypatch.setenv("WHISPR_EXAMPLE_DATABASE_URL", "postgresql://x")
    monkeypatch.setenv("WHISPR_EXAMPLE_WORKERS", "3")
    assert load(ExampleSettings).workers == 3


def test_a_neighbour_that_does_not_run_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHISPR_USER_ADDRESS", "127.0.0.1:1")
    common = load(CommonSettings)
    assert common.address("user") == "127.0.0.1:1"
    assert common.address("media") is None


def test_binds() -> None:
    assert split_bind("0.0.0.0:80") == ("0.0.0.0", 80)
    assert split_bind("[::1]:80") == ("::1", 80)
    for wrong in ("80", ":80", "host:", "host:-1", "host:65536"):
        with pytest.raises(ValueError, match="host:port"):
            split_bind(wrong)
