"""Draws docs/overcomplete.png: what `benchmarks/overcomplete.py --json FILE` measured.

    python docs/overcomplete.py FILE [FILE ...]

A panel for each file and width: time of a step, as times the dense dictionary's at 16 D, by the number of features. Of
several trees of one size the fastest is on the line; the others are points.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from picture import take

PICTURE = Path(__file__).with_name("overcomplete.png")
WIDTH, HEIGHT = 560, 420

PAGE = """<!doctype html><meta charset="utf-8"><style>
body { margin: 0; background: #fff; color: #222; font: 13px DejaVu Sans, sans-serif; display: flex; }
section { width: WIDTHpx; padding: 8px 0 0 12px; box-sizing: border-box; }
h2 { margin: 0 0 4px; font-size: 14px; }
</style><body></body><script>D3</script><script>PLOT</script><script>
const colors = {tree: "#1f77b4", dense: "#2ca02c", sparsify: "#d62728"};
const names = {tree: "tree", dense: "dense, ours", sparsify: "dense, sparsify"};
for (const panel of PANELS) {
  const section = document.body.appendChild(document.createElement("section"));
  section.appendChild(document.createElement("h2")).textContent = panel.title;
  const best = d3.rollups(panel.points, of => d3.least(of, point => point.times), point => point.kind, point => point.size)
    .flatMap(([, sizes]) => sizes.map(([, point]) => point)).sort((a, b) => a.size - b.size);
  const last = d3.rollups(best, of => of.at(-1), point => point.kind).map(([, point]) => point);
  section.append(Plot.plot({
    width: WIDTH - 20, height: HEIGHT - 40, marginLeft: 50, marginRight: 96, marginBottom: 40, style: {fontSize: "12px"},
    x: {type: "log", base: 4, ticks: [16, 64, 256, 1024, 4096], tickFormat: d => `${d} D`, label: "features"},
    y: {type: "log", base: 2, ticks: [0.5, 1, 1.5, 2, 4, 8, 16, 32], tickFormat: d => `${d}`, grid: true, label: "time of a step, times dense at 16 D"},
    marks: [
      Plot.ruleY([1.5], {stroke: "#888", strokeDasharray: "4 3"}),
      Plot.line(best, {x: "size", y: "times", z: "kind", stroke: point => colors[point.kind], strokeWidth: 2}),
      Plot.ruleX(best, {x: "size", y1: "low", y2: "high", stroke: point => colors[point.kind]}),
      Plot.dot(panel.points, {x: "size", y: "times", r: 3, fill: point => best.includes(point) ? colors[point.kind] : "#fff", stroke: point => colors[point.kind]}),
      Plot.text(last, {x: "size", y: "times", text: point => names[point.kind], fill: point => colors[point.kind], textAnchor: "start", dx: 8}),
    ],
  }));
}
</script>"""


def panels(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of one file."""
    made: dict[int, dict[str, Any]] = {}
    for each in facts:
        _, _, name, what = each["name"].split("/")
        if what != "times":
            continue
        config = each["config"]
        kind = "sparsify" if name.startswith("sparsify") else "tree" if name.startswith("tree") else "dense"
        title = f"D {config['width']}, k {config['k']}, B {config['batch']}, {config['threads']} threads"
        panel = made.setdefault(config["width"], {"title": title, "points": []})
        every = config["every"]
        point = {"kind": kind, "size": config["expansion"], "times": each["value"]}
        panel["points"].append(point | {"low": min(every), "high": max(every)})
    return list(made.values())


def main() -> None:
    """Read, and draw."""
    parser = argparse.ArgumentParser(description="Draws what benchmarks/overcomplete.py measured.")
    parser.add_argument("file", nargs="+", type=Path)
    every = [panel for file in parser.parse_args().file for panel in panels(json.loads(file.read_text()))]
    page = PAGE.replace("PANELS", json.dumps(every)).replace("WIDTH", str(WIDTH)).replace("HEIGHT", str(HEIGHT))
    take(page, PICTURE, WIDTH * len(every), HEIGHT)


if __name__ == "__main__":
    main()
