"""Envoy's configuration, made from the routes.

Envoy checks access tokens where a route wants one, limits each person coarsely, hides a restarting service behind
retries, and answers everything it refuses as `application/problem+json` with the codes the services use.
"""

import json
from typing import Any

from whispr.instance.catalog import Route
from whispr.instance.gateway import METRICS_PATH, Plan

HTTP_FILTERS = "type.googleapis.com/envoy.extensions.filters.http"
ANY_CORS = {"header": {"key": "access-control-allow-origin", "value": "*"}, "append_action": "ADD_IF_ABSENT"}

# A restarting service is back within two seconds: ten tries with these pauses bridge about four.
RETRIES = {
    "num_retries": 10,
    "retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"},
}
# Only failures before a request was sent: repeating those is safe whatever the method.
UNSENT = "connect-failure,refused-stream,reset-before-request"

UNLIMITED = 1_000_000

# Shorter than the services keep an idle connection: they would else close one on which a request is just being sent.
CONNECTIONS = {
    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
    "common_http_protocol_options": {"idle_timeout": "60s"},
    "explicit_http_config": {"http_protocol_options": {}},
}


def configuration(plan: Plan) -> dict[str, Any]:
    """The static bootstrap. Of TCP nothing is reachable but the public port: Envoy's administration, which could end the
    process and show its configuration, is a Unix socket of its owner and tells the metrics only."""
    return {
        "node": {"id": "whispr-gateway", "cluster": "whispr"},
        "admin": {
            "address": {"pipe": {"path": plan.admin, "mode": 0o600}},
            "allow_paths": [{"prefix": METRICS_PATH}],
        },
        "static_resources": {"listeners": [_listener(plan)], "clusters": _clusters(plan)},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": UNLIMITED,
                    },
                }
            ]
        },
    }


def _listener(plan: Plan) -> dict[str, Any]:
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "public",
        "codec_type": "AUTO",
        "use_remote_address": True,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "server_name": "whispr",
        "preserve_external_request_id": True,
        # Envoy would else write into a client's request id whether it is traced.
        "request_id_extension": {
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": False,
            }
        },
        "always_set_request_id_in_response": True,
        "stream_idle_timeout": "120s",
        "request_headers_timeout": "10s",
        "max_request_headers_kb": 32,
        "common_http_protocol_options": {
            "idle_timeout": "600s",
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "http_filters": _filters(plan),
        "local_reply_config": {"mappers": _refusals()},
        "route_config": {"name": "public", "virtual_hosts": [_host(plan)]},
    }
    return {
        "name": "public",
        "address": _address(plan.host, plan.port),
        "per_connection_buffer_limit_bytes": 65536,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _filters(plan: Plan) -> list[dict[str, Any]]:
    filters = [{"name": "envoy.filters.http.jwt_authn", "typed_config": _token_check(plan)}]
    if plan.rate_limits:
        filters.append({"name": "envoy.filters.http.local_ratelimit", "typed_config": _rate_limit(plan)})
    router = {"@type": f"{HTTP_FILTERS}.router.v3.Router", "suppress_envoy_headers": True}
    return [*filters, {"name": "envoy.filters.http.router", "typed_config": router}]


def _token_check(plan: Plan) -> dict[str, Any]:
    rules: list[dict[str, Any]] = []
    for route in plan.routes:
        for match in _matches(route):
            rules.append(
                {"match": match, **({"requires": {"provider_name": "whispr"}} if route.token else {})}
            )
    provider = {
        "issuer": plan.issuer,
        "audiences": [plan.audience],
        "remote_jwks": {
            "http_uri": {
                "uri": f"http://127.0.0.1:{plan.addresses['auth', 'http']}/.well-known/jwks.json",
                "cluster": cluster_name("auth", "http"),
                "timeout": "2s",
            },
            # auth publishes a key an hour before it signs with it.
            "cache_duration": "60s",
            "async_fetch": {"failed_refetch_duration": "1s"},
            "retry_policy": {"num_retries": 5},
        },
        # The services check the token again: the gateway is a first sieve, not the guard.
        "forward": True,
        "from_headers": [{"name": "authorization", "value_prefix": "Bearer "}],
        "payload_in_metadata": "payload",
        "clock_skew_seconds": 10,
    }
    return {
        "@type": f"{HTTP_FILTERS}.jwt_authn.v3.JwtAuthentication",
        "providers": {"whispr": provider},
        "rules": rules,
        "bypass_cors_preflight": True,
    }


def _rate_limit(plan: Plan) -> dict[str, Any]:
    """A bucket per person. Requests without a token have none here; the services limit those by address and name."""
    return {
        "@type": f"{HTTP_FILTERS}.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "person",
        "filter_enabled": {"default_value": {"numerator": 100}},
        "filter_enforced": {"default_value": {"numerator": 100}},
        "token_bucket": {"max_tokens": UNLIMITED, "tokens_per_fill": UNLIMITED, "fill_interval": "1s"},
        "descriptors": [
            {
                "entries": [{"key": "person"}],
                "token_bucket": {
                    "max_tokens": plan.burst,
                    "tokens_per_fill": plan.requests_per_second,
                    "fill_interval": "1s",
                },
            }
        ],
        "max_dynamic_descriptors": 10_000,
        "always_consume_default_token_bucket": False,
        "rate_limits": [
            {
                "actions": [
                    {
                        "metadata": {
                            "descriptor_key": "person",
                            "source": "DYNAMIC",
                            "metadata_key": {
                                "key": "envoy.filters.http.jwt_authn",
                                "path": [{"key": "payload"}, {"key": "sub"}],
                            },
                        }
                    }
                ]
            }
        ],
    }


def _host(plan: Plan) -> dict[str, Any]:
    routes = [
        {
            "match": {"path": "/readyz"},
            "route": {"cluster": cluster_name("readiness", "http"), "timeout": "10s"},
        }
    ]
    for route in plan.routes:
        for match in _matches(route):
            routes += _routes(route, match)
    return {"name": "public", "domains": ["*"], "routes": routes}


def _routes(route: Route, match: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    if route.max_body is not None:
        too_large = {"name": "content-length", "range_match": {"start": route.max_body + 1, "end": 2**62}}
        found.append({"match": {**match, "headers": [too_large]}, "direct_response": {"status": 413}})
    action: dict[str, Any] = {
        "cluster": cluster_name(route.service, route.door),
        "timeout": "0s" if route.timeout is None else f"{route.timeout}s",
    }
    if route.timeout is None:
        action["idle_timeout"] = "0s"
    if route.door == "socket":
        upgrades = [{"upgrade_type": "websocket"}]
        return [*found, {"match": match, "route": {**action, "upgrade_configs": upgrades}}]
    # A read whose answer was cut off is asked again; a write is not, for it may have been done.
    reads = {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}}
    again = {**RETRIES, "retry_on": f"{UNSENT},reset"}
    found.append({"match": {**match, "headers": [reads]}, "route": {**action, "retry_policy": again}})
    found.append({"match": match, "route": {**action, "retry_policy": {**RETRIES, "retry_on": UNSENT}}})
    return found


def _matches(route: Route) -> list[dict[str, Any]]:
    return [{"path": route.prefix}] if route.exact else [{"path_separated_prefix": route.prefix}]


def _clusters(plan: Plan) -> list[dict[str, Any]]:
    used = dict.fromkeys((route.service, route.door) for route in plan.routes)
    ports = {cluster_name(*pair): plan.addresses[pair] for pair in used}
    ports[cluster_name("readiness", "http")] = plan.readiness
    return [_cluster(name, port) for name, port in ports.items()]


def _cluster(name: str, port: int) -> dict[str, Any]:
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "0.5s",
        "per_connection_buffer_limit_bytes": 65536,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": CONNECTIONS
        },
        # Each socket of a person is a connection of its own; the default of 1,024 would be the system's limit.
        "circuit_breakers": {"thresholds": [dict.fromkeys(limits, UNLIMITED)]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address("127.0.0.1", port)}}]}],
        },
    }


def cluster_name(service: str, door: str) -> str:
    return f"{service}-{door}"


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _refusals() -> list[dict[str, Any]]:
    """Envoy's own answers. The first that matches is taken: why a token was refused stands in the code details."""
    return [
        _refusal(401, "unauthenticated", "An access token is needed.", details="Jwt_is_missing"),
        _refusal(401, "token_expired", "The access token has expired.", details="Jwt_is_expired"),
        _refusal(401, "invalid_token", "The access token is not valid."),
        _refusal(403, "invalid_token", "The access token is not for this server."),
        _refusal(404, "not_found", "There is nothing at this address."),
        _refusal(413, "too_large", "The request is too large."),
        _refusal(429, "rate_limited", "Too many requests.", retry_after=1),
        _refusal(431, "too_large", "The request's headers are too large."),
        _refusal(503, "unavailable", "The service is not available at the moment.", retry_after=1),
        _refusal(504, "unavailable", "The service took too long to answer.", retry_after=1),
        _refusal(400, "invalid_request", "The request is not valid HTTP."),
    ]


TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    413: "Content Too Large",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def _refusal(
    status: int, code: str, detail: str, *, details: str | None = None, retry_after: int | None = None
) -> dict[str, Any]:
    condition: dict[str, Any] = {
        "status_code_filter": {
            "comparison": {"op": "EQ", "value": {"default_value": status, "runtime_key": "gateway.status"}}
        }
    }
    if details is not None:
        expression = {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
            "expression": f"response.code_details.contains('{details}')",
        }
        cel = {"name": "envoy.access_loggers.extension_filters.cel", "typed_config": expression}
        condition = {"and_filter": {"filters": [condition, {"extension_filter": cel}]}}
    headers = [ANY_CORS]
    if retry_after is not None:
        headers.append(
            {"header": {"key": "retry-after", "value": str(retry_after)}, "append_action": "ADD_IF_ABSENT"}
        )
    return {
        "filter": condition,
        "headers_to_add": headers,
        "body_format_override": {
            "content_type": "application/problem+json",
            "json_format": {
                "type": "about:blank",
                "title": TITLES[status],
                "status": status,
                "detail": detail,
                "code": code,
                "request_id": "%REQ(x-request-id)%",
            },
        },
    }


def render(plan: Plan) -> str:
    """The configuration as Envoy reads it from a .json file."""
    return json.dumps(configuration(plan), indent=1)
