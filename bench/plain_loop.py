"""Koinon against a plain PyTorch loop: CIFAR-10, 8 Dirichlet(0.5) sites, the same split, network and settings.

    python bench/plain_loop.py --data ../shared/data/cifar10 --rounds 10 --repeats 1

Each arm runs in its own process, in turn; the figure is the ratio within one pair.  Prints one JSON line a pair:
seconds a round (median, evaluation included) and the final accuracy of both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "examples"))


def loop(data: str, rounds: int) -> dict[str, list[float]]:
    """Federated averaging as one would write it by hand: torch.optim.SGD, state dicts, a weighted mean."""
    import torch
    from cifar10 import SimpleNetwork
    from torch.nn.functional import cross_entropy

    import koinon

    split = koinon.data.cifar10(data).split(koinon.dirichlet(0.5), sites=8, test="both")
    parts = [split.site(number).train for number in range(split.sites)]
    sites = [(torch.from_numpy(part.x), torch.from_numpy(part.y.copy())) for part in parts]
    held_out = (torch.from_numpy(split.server.x), torch.from_numpy(split.server.y.copy()))
    torch.manual_seed(0)
    model = SimpleNetwork()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seconds, accuracy = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        for x, y in sites:
            model.load_state_dict(weights)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            for batch in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
            for name, tensor in model.state_dict().items():
                total[name] += tensor * len(x)
        weights = {name: tensor / sum(len(x) for x, _ in sites) for name, tensor in total.items()}
        model.load_state_dict(weights)
        model.eval()
        with torch.inference_mode():
            outputs = torch.cat([model(part) for part in held_out[0].split(1000)])
        accuracy.append((outputs.argmax(1) == held_out[1]).float().mean().item())
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "accuracy": accuracy}


def ours(data: str, rounds: int) -> dict[str, list[float]]:
    """The example, through the public API, with metrics, fold and commit of every round."""
    import cifar10

    import koinon

    with tempfile.TemporaryDirectory() as folder:
        run = koinon.simulate(cifar10.job(data=data, rounds=rounds), out=Path(folder) / "run", sinks=())
        return {name: [row.value for row in run.series(name)] for name in ("seconds", "accuracy")}


def main() -> None:
    """Run both arms in turn, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(HERE.parents[2] / "shared" / "data" / "cifar10"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--arm", choices=["loop", "ours"])
    args = parser.parse_args()
    if args.arm:
        print(json.dumps({"loop": loop, "ours": ours}[args.arm](args.data, args.rounds)))
        return
    settings = ["--data", args.data, "--rounds", str(args.rounds)]
    for _ in range(args.repeats):
        found = {}
        for arm in ("ours", "loop"):
            command = [sys.executable, str(HERE), "--arm", arm, *settings]
            found[arm] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        line = {"bench": "plain_loop", "rounds": args.rounds}
        for arm, result in found.items():
            line[f"{arm}_seconds_a_round"] = round(statistics.median(result["seconds"]), 2)
            line[f"{arm}_accuracy"] = round(result["accuracy"][-1], 4)
        line["ratio"] = round(line["loop_seconds_a_round"] / line["ours_seconds_a_round"], 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
