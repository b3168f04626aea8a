"""Counters of the service in the text format of Prometheus (0.0.4).

Written by the event loop's thread only, so there are no locks. A route is a fixed path of the service, never what a client
sent: the number of series does not grow with the traffic.
"""

from collections import Counter
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
PREFIX = "recis_ebrm"


class ServiceMetrics:
    """What the service did since it was started.

    Attributes:
        requests: (route, status) -> requests.
        seconds: route -> sum of their time.
        slower: (route, bucket) -> requests whose time fell into that bucket; bucket len(BUCKETS_S) is "longer".
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.slower: Counter[tuple[str, int]] = Counter()

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.requests[route, status] += 1
        self.seconds[route] += seconds  # type: ignore[assignment]  # a Counter adds floats as well
        bucket = next((place for place, limit in enumerate(BUCKETS_S) if seconds <= limit), len(BUCKETS_S))
        self.slower[route, bucket] += 1

    def text(self, counters: Mapping[str, float], gauges: Mapping[str, float], *, model_version: str) -> str:
        """Return everything as Prometheus reads it; counters and gauges are those that the model keeps, by name."""
        lines = _head("requests_total", "counter", "Requests answered, by route and status.")
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'{PREFIX}_requests_total{{route="{route}",status="{status}"}} {count}')
        lines += _head("request_seconds", "histogram", "Time from a request's first byte to its answer, by route.")
        for route in sorted(self.seconds):
            below = 0
            for place, limit in enumerate(BUCKETS_S):
                below += self.slower[route, place]
                lines.append(f'{PREFIX}_request_seconds_bucket{{route="{route}",le="{limit}"}} {below}')
            count = below + self.slower[route, len(BUCKETS_S)]
            lines.append(f'{PREFIX}_request_seconds_bucket{{route="{route}",le="+Inf"}} {count}')
            lines.append(f'{PREFIX}_request_seconds_sum{{route="{route}"}} {self.seconds[route]:.6f}')
            lines.append(f'{PREFIX}_request_seconds_count{{route="{route}"}} {count}')
        for kind, values in (("counter", counters), ("gauge", gauges)):
            for name, value in values.items():
                lines += [f"# TYPE {PREFIX}_{name} {kind}", f"{PREFIX}_{name} {value:.10g}"]
        lines += _head("model_info", "gauge", "1; the label names the model.")
        lines.append(f'{PREFIX}_model_info{{version="{model_version}"}} 1')
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {help_text}", f"# TYPE {PREFIX}_{name} {kind}"]
