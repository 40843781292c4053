"""Published numbers, reached by the examples as they stand."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'koinon[torch]'")

from koinon.operate.session import Order
from koinon.simulate import simulate

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def data(folder: Path, name: str) -> str:
    if not (folder / name).is_dir():
        pytest.skip(f"there is no {folder / name}")
    return str(folder / name)


def test_fed_tcga_brca_reaches_flambys_concordance(tmp_path, shared_data):
    """FedAvg over six regions: FLamby reports a pooled c-index of .735 +- .157 (Terrail et al., 2022, table 3)."""
    settings, reached = {"data": data(shared_data, "tcga_brca")}, []
    for seed in range(42, 47):
        order = Order(file=str(EXAMPLES / "tcga.py"), settings=settings, seed=seed)
        run = simulate(order.job(), seed=seed, out=tmp_path / str(seed), sinks=())
        reached.append(run.series("c_index")[-1].value)
    assert np.mean(reached) == pytest.approx(0.735, abs=0.157), reached


def test_cifar10_learns_in_ten_rounds(tmp_path, shared_data):
    """FLARE's small network over eight sites under Dirichlet(0.5): above .45 after ten rounds of one epoch."""
    order = Order(file=str(EXAMPLES / "cifar10.py"), settings={"data": data(shared_data, "cifar10")}, rounds=10)
    run = simulate(order.job(), out=tmp_path / "run", sinks=())
    assert run.series("accuracy")[-1].value > 0.45
