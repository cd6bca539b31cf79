"""What a dashboard sees of a run: scraped from a real Ray, as Prometheus does it."""

import time
import urllib.request

import pytest

from cluster.ray_cluster import ray_session
from cluster.ray_metrics import Gauges
from jobs.progress import Prometheus
from schemas.events import Progress


def scraped(port: int) -> dict[str, str]:
    """Every gauge of ours, with its tags, and its value; nothing while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    return dict(line.rsplit(" ", 1) for line in lines if line.startswith("ray_kilobasis_"))


def test_gauge_without_a_ray_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ray_metrics.AGAIN_SECONDS", 0.01)
    gauges = Gauges()
    gauges.set("kilobasis_x", 1.0, stage="s")
    time.sleep(0.1)
    gauges.close()
    assert gauges._made == {}


@pytest.mark.ray
def test_scalars_of_a_run_can_be_scraped_from_its_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    watcher, found = Prometheus("mine"), dict[str, str]()
    # What was said before there was a Ray is not lost.
    watcher(Progress("train/tiny", 1, 8, 1600, {"early": 1.0}))
    with ray_session(None, 1):
        import ray

        port = ray.nodes()[0]["MetricsExportPort"]
        deadline = time.monotonic() + 120
        watcher(Progress("train/tiny", 2, 16, 1600, {"fvu": 0.25, "tokens_per_second": 5000.0}))
        while len(found) < 6 and time.monotonic() < deadline:
            time.sleep(0.5)
            found = scraped(port)
        # Ray forgets what is not said again for two seconds. Nothing happens in a long unit, and it stays.
        for _ in range(10):
            time.sleep(0.5)
            assert scraped(port).keys() == found.keys()
    watcher.close()
    by_name = {name.partition("{")[0].removeprefix("ray_kilobasis_"): (name, value) for name, value in found.items()}
    assert by_name.keys() == {"early", "fvu", "tokens_per_second", "step", "done", "total"}
    name, value = by_name["fvu"]
    assert 'run="mine"' in name
    assert 'stage="train/tiny"' in name
    assert float(value) == 0.25
