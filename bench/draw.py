"""Draws docs/pictures/how-fast.png from the dated results.

python bench/draw.py bench/results/2026-11-21-2-cores.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "how-fast.png"
WORKLOADS = {
    "mlp-100": "W1: 100 of 1,000\ndense network",
    "cnn-8": "W2: 8 of 8\nconvolutions",
    "many": "W3: 1,000 of\n10,000, dense",
}
NAMES = {"koinon": "koinon, 2 workers"}
ARMS = {"loop": "#b8b8b8", "loop, processes": "#7f8c9b", "koinon, one process": "#7fb3d5", "koinon": "#1f618d"}


def main(lines: list[dict]) -> None:
    """Three pictures side by side: speed, a round against those asked in it, memory against those registered."""
    figure, (speed, asked, registered) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for place, (arm, color) in enumerate(ARMS.items()):
        found = [
            next(
                line["ratio"]
                for line in reversed(lines)
                if line["bench"].startswith(f"simulation: {name}, ") and "ratio" in line and line["arm"] == arm
            )
            for name in WORKLOADS
        ]
        bars = speed.bar(
            [at + 0.2 * place for at in range(len(found))], found, 0.19, color=color, label=NAMES.get(arm, arm)
        )
        speed.bar_label(bars, fmt="%.1f", fontsize=7)
    speed.set_xticks([at + 0.3 for at in range(len(WORKLOADS))], WORKLOADS.values(), fontsize=8)
    speed.set_title("speed", fontsize=10)
    speed.set_ylabel("clients a second, the plain loop = 1", fontsize=8)
    speed.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.52, 1))
    scale = [line for line in lines if line.get("executor") == "softmax"]  # the latest of each is drawn
    rates = {line["asked"]: line["clients_a_second"] for line in scale if line["bench"] == "scale: memory by cohort"}
    asked.loglog(list(rates), [clients / rate for clients, rate in rates.items()], "o-")
    asked.set_title("a round, by clients asked", fontsize=10)
    asked.set_xlabel("clients asked, of a million", fontsize=8)
    asked.set_ylabel("seconds a round", fontsize=8)
    found = [line for line in scale if line["bench"].endswith("registered") and "peak_mb" in line]
    many = sorted({int(line["bench"].split()[1].replace(",", "")): line for line in found}.items())
    for name, said in (("peak_mb", "all, with the mapped samples"), ("peak_anonymous_mb", "without them")):
        registered.loglog([clients for clients, _ in many], [line[name] for _, line in many], "o-", label=said)
    registered.set_title("memory, by clients registered", fontsize=10)
    registered.set_xlabel("clients registered", fontsize=8)
    registered.set_ylabel("megabytes", fontsize=8)
    registered.legend(fontsize=8, frameon=False)
    for axes in (speed, asked, registered):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    found = map(json.loads, Path(sys.argv[1]).read_text().splitlines())
    main([line for line in found if "bench" in line])
