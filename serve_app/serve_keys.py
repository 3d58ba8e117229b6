"""Every key that a Ray Serve config file may hold, as data: Serve ignores a misspelt one without a word.

A key maps to the keys below it, or to None where anything may stand (free dictionaries and plain values).
Lists are looked through. Kept as data so that reading a config needs no Ray;
tests/serve_app/test_serve_keys.py compares it with ray.serve.schema.ServeDeploySchema (2.60) and prints the table anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Keys: TypeAlias = "Mapping[str, Keys | None]"


def _plain(names: str) -> Keys:
    return dict.fromkeys(names.split())


_LOGGING = _plain("encoding log_level logs_dir enable_access_log additional_log_standard_attrs")

_AUTOSCALING: Keys = {
    **_plain(
        "min_replicas initial_replicas max_replicas target_ongoing_requests metrics_interval_s look_back_period_s "
        "smoothing_factor upscale_smoothing_factor downscale_smoothing_factor upscaling_factor downscaling_factor "
        "downscale_delay_s downscale_to_zero_delay_s upscale_delay_s aggregation_function"
    ),
    "policy": _plain("policy_function policy_kwargs"),
}

_DEPLOYMENT: Keys = {
    **_plain(
        "name num_replicas max_ongoing_requests max_queued_requests user_config graceful_shutdown_wait_loop_s "
        "graceful_shutdown_timeout_s health_check_period_s health_check_timeout_s placement_group_bundles "
        "placement_group_strategy placement_group_bundle_label_selector max_replicas_per_node "
        "rolling_update_percentage max_surge_percent"
    ),
    "backpressure_config": _plain("status_code retry_after_s"),
    "autoscaling_config": _AUTOSCALING,
    "ray_actor_options": _plain(
        "runtime_env num_cpus num_gpus memory resources accelerator_type label_selector fallback_strategy"
    ),
    "logging_config": _LOGGING,
    "request_router_config": _plain(
        "request_router_class request_router_kwargs request_routing_stats_period_s request_routing_stats_timeout_s "
        "initial_backoff_s backoff_multiplier max_backoff_s"
    ),
    "gang_scheduling_config": _plain("gang_size gang_placement_strategy runtime_failure_policy"),
    "deployment_actors": _plain("name actor_class init_args init_kwargs actor_options"),
}

SERVE_KEYS: Keys = {
    **_plain("proxy_location target_capacity"),
    "http_options": _plain(
        "host port root_path request_timeout_s keep_alive_timeout_s ssl_keyfile ssl_certfile ssl_keyfile_password "
        "ssl_ca_certs"
    ),
    "grpc_options": _plain("port grpc_servicer_functions request_timeout_s enable_reflection"),
    "controller_options": _plain("runtime_env"),
    "logging_config": _LOGGING,
    "tracing_config": _plain("enabled exporter_import_path sampling_ratio"),
    "applications": {
        **_plain("name route_prefix import_path runtime_env host port autoscaling_policy args external_scaler_enabled"),
        "deployments": _DEPLOYMENT,
        "logging_config": _LOGGING,
    },
}
