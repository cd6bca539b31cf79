"""Draws docs/grafana.png: the panels of the Grafana dashboard, from a real Prometheus' answers to the dashboard's queries.

    python docs/dashboard.py jobs/manifests/quickstart.yaml [--set a.b=c ...]

Starts a Ray and a Prometheus (Debian: apt-get install prometheus) that scrapes it every second, runs the manifest on
it, asks every query of cluster/deploy/grafana/kilobasis.json over the time of the run, and draws the answers in the
dashboard's grid with the report's own plotting library, in a headless chromium (make browser). Grafana is not needed.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from picture import take

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "cluster" / "deploy" / "grafana" / "kilobasis.json"
PICTURE = ROOT / "docs" / "grafana.png"
WIDTH, ROW = 1600, 32

PAGE = """<!doctype html><meta charset="utf-8"><style>
body { margin: 0; background: #111217; color: #ccccdc; font: 13px DejaVu Sans, sans-serif; }
main { position: relative; width: WIDTHpx; }
section { position: absolute; box-sizing: border-box; padding: 6px 10px; background: #181b1f; border: 1px solid #2c2f36; }
h2 { margin: 0 0 2px; font-size: 13px; font-weight: 600; }
.legend { position: absolute; left: 10px; right: 10px; bottom: 4px; font-size: 10px; line-height: 13px; }
.legend i { display: inline-block; width: 10px; height: 3px; margin: 0 3px 3px 0; }
.legend span { margin-right: 8px; white-space: nowrap; display: inline-block; }
.bar { display: flex; align-items: center; margin: 6px 0; }
.bar b { flex: 0 0 150px; font-weight: normal; } .bar em { flex: 0 0 56px; text-align: right; font-style: normal; }
.bar div { flex: 1; height: 14px; background: #2c2f36; } .bar div div { background: #73bf69; }
.stat { display: flex; gap: 8px; height: 170px; }
.stat div { flex: 1; display: flex; flex-direction: column; align-items: center; justify-content: center; color: #fff; }
.stat b { font-size: 34px; }
.none { margin: 60px 0; text-align: center; color: #7b7f88; }
</style><main></main><script>D3</script><script>PLOT</script><script>
const panels = PANELS, CELL = WIDTH / 24;
const colors = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#8ab8ff", "#fade2a", "#ff7383"];
const scaled = (base, names) => v => {
  let at = 0;
  while (Math.abs(v) >= base && at < names.length - 1) { v /= base; at += 1; }
  return +v.toPrecision(3) + names[at];
};
const units = {
  percentunit: v => +(100 * v).toPrecision(3) + " %", s: v => v < 1 ? +(1000 * v).toPrecision(3) + " ms" : +v.toPrecision(3) + " s",
  bytes: scaled(1024, [" B", " KiB", " MiB", " GiB", " TiB"]), Bps: scaled(1000, [" B/s", " kB/s", " MB/s", " GB/s"]),
  short: scaled(1000, ["", " K", " Mil", " Bil"]), sci: v => v ? v.toExponential(1) : "0",
};
function element(parent, name, kind, text) {
  const made = parent.appendChild(document.createElement(name));
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}
function bars(section, panel, format) {
  for (const each of panel.series) {
    const row = element(section, "div", "bar"), value = each.points.at(-1)[1];
    element(row, "b", "", each.name);
    element(element(row, "div"), "div").style.width = 100 * Math.min(1, value) + "%";
    element(row, "em", "", format(value));
  }
}
function stats(section, panel) {
  const box = element(section, "div", "stat");
  for (const each of panel.series) {
    const value = each.points.at(-1)[1], shown = element(box, "div");
    const step = panel.steps.filter(step => step.value === null || value >= step.value).at(-1);
    shown.style.background = {green: "#37872d", orange: "#e0782a", red: "#c4162a"}[step.color];
    element(shown, "b", "", value);
    element(shown, "span", "", each.name);
  }
}
function lines(section, panel, format) {
  const rows = panel.series.flatMap((each, at) => each.points.map(([when, value]) => ({when: new Date(when * 1000), value, at})));
  section.append(Plot.plot({
    width: panel.at.w * CELL - 28, height: panel.at.h * ROW_HEIGHT - 68, marginLeft: 62, marginBottom: 22, marginTop: 10,
    style: {background: "none", color: "#9fa3ad", fontSize: "11px"},
    x: {type: "utc", label: null, ticks: 5, tickFormat: "%H:%M:%S", domain: SPAN.map(when => new Date(when * 1000))},
    y: {label: null, grid: true, ticks: 4, tickFormat: format, zero: true, nice: true},
    marks: [Plot.line(rows, {x: "when", y: "value", z: "at", stroke: row => colors[row.at % colors.length], strokeWidth: 1.5}),
            Plot.dot(panel.series.flatMap((each, at) => each.points.length < 4 ? rows.filter(row => row.at === at) : []),
                     {x: "when", y: "value", r: 2, fill: row => colors[row.at % colors.length]})],
  }));
  const legend = element(section, "div", "legend");
  panel.series.forEach((each, at) => {
    const named = element(legend, "span");
    element(named, "i").style.background = colors[at % colors.length];
    named.append(each.name);
  });
}
for (const panel of panels) {
  const section = element(document.querySelector("main"), "section");
  Object.assign(section.style, {left: panel.at.x * CELL + "px", top: panel.at.y * ROW_HEIGHT + "px",
                                width: panel.at.w * CELL - 4 + "px", height: panel.at.h * ROW_HEIGHT - 4 + "px"});
  element(section, "h2", "", panel.title);
  if (!panel.series.length) element(section, "div", "none", "No data");
  else ({bargauge: bars, stat: stats, timeseries: lines})[panel.type](section, panel, units[panel.unit]);
}
</script>"""


def main() -> None:
    """Run, ask, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="as for kilobasis run")
    options = parser.parse_args()
    for program in ("prometheus", "chromium"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed (Debian: apt-get install {program})")
    with tempfile.TemporaryDirectory(prefix="kb-doc-") as folder, ExitStack() as stack:
        work, began = Path(folder), time.time()
        gcs, exporter, prometheus = free_ports(3)
        stack.enter_context(ray(work, gcs, exporter))
        stack.enter_context(scraping(work, exporter, prometheus))
        root = work / "root"
        overrides = [*options.set, f"root={root}", f"compute.address=127.0.0.1:{gcs}"]
        command = [sys.executable, "-m", "jobs", "run", options.manifest]
        subprocess.run([*command, *(word for each in overrides for word in ("--set", each))], cwd=ROOT, check=True)
        # What was said last is scraped within two seconds.
        time.sleep(2.0)
        (run,) = [path.name for path in (root / "runs").iterdir()]
        draw(answers(prometheus, run, began, time.time()), (began, time.time()))
    print(PICTURE.relative_to(ROOT))


def free_ports(count: int) -> list[int]:
    """TCP ports of this machine that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def started(command: list[str], log: Path) -> Iterator[None]:
    """A program in the background, ended in the end."""
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)


@contextmanager
def ray(work: Path, gcs: int, exporter: int) -> Iterator[None]:
    """A Ray of one machine, which says its metrics every second, on loopback, to whoever has the token."""
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=false"]
    command += [
        "--node-ip-address=127.0.0.1",
        f"--port={gcs}",
        f"--metrics-export-port={exporter}",
        f"--temp-dir={work}/r",
    ]
    with started(command, work / "ray.log"):
        wait_for(f"http://127.0.0.1:{exporter}/metrics")
        yield


@contextmanager
def scraping(work: Path, exporter: int, port: int) -> Iterator[None]:
    """A Prometheus that asks a Ray every second."""
    target = {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}]}
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [target]}
    # JSON is YAML.
    (work / "prometheus.yml").write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={work}/prometheus.yml", f"--storage.tsdb.path={work}/tsdb"]
    with started([*command, f"--web.listen-address=127.0.0.1:{port}"], work / "prometheus.log"):
        wait_for(f"http://127.0.0.1:{port}/-/ready")
        yield


def wait_for(url: str) -> None:
    """Until a server answers."""
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def answers(port: int, run: str, began: float, ended: float) -> list[dict[str, Any]]:
    """What each panel shows: Prometheus' answers to its queries, as Grafana would ask them."""
    panels = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        series = []
        for target in panel["targets"]:
            query = target["expr"].replace("$run", run).replace("$stage", ".*")
            asked = urllib.parse.urlencode({"query": query, "start": began, "end": ended, "step": 1})
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query_range?{asked}", timeout=60) as answer:
                for found in json.load(answer)["data"]["result"]:
                    name = target["legendFormat"].replace("{{stage}}", found["metric"].get("stage", ""))
                    points = [[when, float(value)] for when, value in found["values"] if value != "NaN"]
                    series += [{"name": name, "points": points}] if points else []
        defaults = panel["fieldConfig"]["defaults"]
        steps = defaults.get("thresholds", {}).get("steps", [])
        panels.append(
            {"title": panel["title"], "type": panel["type"], "unit": defaults["unit"], "at": panel["gridPos"]}
            | {"series": series, "steps": steps}
        )
        print(f"{panel['title']}: {len(series)} series")
    return panels


def draw(panels: list[dict[str, Any]], span: tuple[float, float]) -> None:
    """Take a picture of the panels."""
    height = max(panel["at"]["y"] + panel["at"]["h"] for panel in panels) * ROW
    page = PAGE.replace("PANELS", json.dumps(panels)).replace("SPAN", json.dumps(span))
    page = page.replace("WIDTH", str(WIDTH)).replace("ROW_HEIGHT", str(ROW))
    take(page, PICTURE, WIDTH, height)


if __name__ == "__main__":
    main()
