"""Ray actors: the same bits as without them, also if a node dies; what is missing is said, and nothing stays behind."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

import koinon
from koinon.errors import JobError, MissingExtra, RunError, SettingsError
from simulate import executors, test_workers
from simulate.test_workers import MEDIAN, Unready, feedback, job, run, said

ray = pytest.importorskip("ray", reason="Ray is not installed")
engine = import_module("koinon.simulate.ray")

QUICK = '{"health_check_initial_delay_ms":500,"health_check_period_ms":300,"health_check_timeout_ms":1500}'
"""A cluster that notices soon that a node is dead: by default it takes half a minute."""


def marked(mark):
    """The processes, zombies left out, that inherited these words in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and f"KOINON_TEST={mark}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
        except OSError:
            continue
    return found


@dataclass
class Nodes:
    """A cluster of nodes that are processes of this machine, each with a raylet of its own."""

    port: int
    clients: int
    folder: str
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def raylets(self):
        return {pid for pid, line in marked(self.mark).items() if b"raylet/raylet" in line.split(b"\0")[0]}

    def start(self, *options):
        """One more node; the process id of its raylet."""
        before = self.raylets()
        command = [str(Path(sys.executable).with_name("ray")), "start", "--object-store-memory=100000000", *options]
        ours = {"RAY_AUTH_MODE": "token", "KOINON_TEST": self.mark}
        # The server of Ray's clients forks, which gRPC makes it die of now and then.
        environment = {**os.environ, **ours, "GRPC_ENABLE_FORK_SUPPORT": "0"}
        started = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert started.returncode == 0, started.stderr
        (raylet,) = self.raylets() - before
        return raylet

    def add(self, *options):
        return self.start(f"--address=127.0.0.1:{self.port}", *options)

    def stop(self):
        while alive := marked(self.mark):
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def cluster():
    """A head with one core, whose cluster this process has joined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
            ports = [free.getsockname()[1] for free in (one, other)]
        nodes = Nodes(*ports, tempfile.mkdtemp(prefix="koinon-", dir="/tmp"))  # the name of a socket must be short
        try:
            ports = [f"--port={nodes.port}", f"--ray-client-server-port={nodes.clients}"]
            options = ["--num-cpus=1", f"--temp-dir={nodes.folder}", "--include-dashboard=false"]
            nodes.start("--head", *ports, *options, f"--system-config={QUICK}")
            # With "auto", Ray takes up its token, though it has been imported before.
            ray.init(address="auto", _temp_dir=nodes.folder, log_to_driver=False, logging_level="ERROR")
            yield nodes
        finally:
            ray.shutdown()
            os.environ.pop("RAY_AUTH_MODE", None)  # which Ray has set
            nodes.stop()


@pytest.fixture(scope="module")
def second(cluster):
    """A second node of that cluster, with a core and a GPU that is one in name only: its raylet."""
    return cluster.add("--num-cpus=1", "--num-gpus=1")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere"])
def test_no_cluster_at_the_address(tmp_path, address, monkeypatch):
    """It is said at once, with what begins one; where no address is given, also of that in Ray's own variable."""
    with pytest.raises(RunError, match=f"no Ray cluster at '{address}': begin one with `ray start --head`"):
        run(tmp_path, job(), koinon.ray(address))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError, match=f"no Ray cluster at '{address}'"):
        run(tmp_path / "variable", job(), koinon.ray())


def test_a_cluster_that_refuses_is_not_one_that_is_missing(tmp_path, monkeypatch):
    """Ray itself says why; what must be the same is said by us."""

    def init(**settings):
        raise RuntimeError("Version mismatch: The cluster was started with Ray 1.0")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        RunError, match=r"at 'auto' cannot be joined \(Version mismatch: .*\): every machine needs the same"
    ):
        run(tmp_path, job(), koinon.ray("auto"))


def test_without_ray_its_extra_is_named(tmp_path, monkeypatch):
    """In one line."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"this needs ray: pip install 'koinon\[ray\]'"):
        run(tmp_path, job(), koinon.ray())


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"workers": 0}, "workers must be 1 or more"),
        ({"cpus": 0}, "needs CPUs or GPUs"),
        ({"gpus": -1}, "not 1 and -1"),
    ],
)
def test_a_worker_that_cannot_be(settings, why):
    """Nobody to work, or with nothing, is a mistake."""
    with pytest.raises(SettingsError, match=why):
        koinon.ray(**settings)


HELPER = """
import numpy as np

def median(updates, weights):
    return {"w": np.median([update["w"] for update in updates], axis=0)}
"""

JOB = """
import numpy as np, koinon

def step(model, data):
    x, error = data["x"], data["x"] @ model["w"] - data["y"]
    return {"w": model["w"] - 0.1 * x.T @ error / len(data)}

@koinon.task("train")
def train(model, data, context):
    return step(model, data), len(data), {"loss": float(model["w"].sum())}

def median(updates, weights):
    return {"w": np.median([update["w"] for update in updates], axis=0)}

def job(beside: bool = False):
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    data = koinon.data.arrays(x, x.sum(1)).split(koinon.iid(), sites=20)
    if beside:
        import helper
        rule = koinon.collect(helper.median)
    else:
        rule = koinon.collect(lambda updates, weights: median(updates, weights))
    controller = koinon.FedAvg(rounds=2, aggregator=rule)
    return koinon.Job(controller, train, model={"w": np.zeros(3, np.float32)}, data=data, score="loss")
"""


def command_line(folder, *words):
    """`koinon run` in a process of its own, and those that are left of it."""
    mark = secrets.token_hex(8)
    command = [sys.executable, "-m", "koinon.operate.cli", "run", "../job.py", *words]
    environment = {**os.environ, "KOINON_TEST": mark, "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    for _ in range(200):
        if not (left := marked(mark)):
            break
        time.sleep(0.05)
    return done, left


def test_a_job_file_runs_on_a_cluster(tmp_path, cluster):
    """Its functions reach the actors of its own cluster and of one far away, and a module beside it those of its own.

    No process remains.
    """
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "job.py").write_text(JOB)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    models = set()
    for out, on, beside in (
        ("alone", "1", "false"),
        ("own", "ray", "true"),
        ("far", f"ray://127.0.0.1:{cluster.clients}", "false"),
    ):
        done, left = command_line(elsewhere, "--on", on, "--out", out, "--set", f"beside={beside}")
        assert done.returncode == 0, done.stderr
        assert not left
        models.add(koinon.tracking.read(elsewhere / out).model()["w"].tobytes())
    assert len(models) == 1


def test_what_a_client_has_and_the_cluster_has_not(tmp_path, cluster):
    """A module beside the job file: one line says so."""
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "job.py").write_text(JOB)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    done, _ = command_line(elsewhere, "--on", f"ray://127.0.0.1:{cluster.clients}", "--set", "beside=true")
    assert done.returncode == 1
    assert "error: the Ray cluster cannot read this job (No module named 'helper'): every machine" in done.stderr


@pytest.mark.parametrize(
    "parts",
    [{"upload": koinon.clip(0.1)}, {"upload": feedback}, {"aggregator": MEDIAN}],
    ids=["filter", "filter with memory", "every update is needed"],
)
def test_the_bits_do_not_depend_on_the_cluster(tmp_path, second, parts):
    """None, processes, actors on two nodes; also what is recorded, but for the times."""
    runs = [run(tmp_path / str(n), job(**parts), on) for n, on in enumerate((1, 2, koinon.ray(workers=2)))]
    assert len({model for model, _ in runs}) == 1
    rows = [
        [(e.round, e.site, e.values.get("train_loss"), e.values.get("bytes_up")) for e in events if e.kind == "result"]
        for _, events in runs
    ]
    assert rows[0] == rows[1] == rows[2]
    assert ray.is_initialized()


def test_a_cohort_is_the_same_on_a_cluster(tmp_path, second):
    """PyTorch's cohorts, of sites of unequal size."""
    executor = test_workers.torch_executor()
    split = koinon.data.digits().split(koinon.dirichlet(0.5), sites=40)
    models = []
    for on in (1, 2, koinon.ray()):
        both = koinon.Job(koinon.FedAvg(rounds=2), executor, data=split)
        models.append(koinon.simulate(both, on=on, out=tmp_path / f"run-{len(models)}", sinks=()).model())
    for model in models[1:]:
        assert all(models[0][name].tobytes() == model[name].tobytes() for name in models[0])


def test_an_actor_opens_its_executor_once(tmp_path, second):
    """However many rounds; two share a GPU, and each has one thread."""
    run(tmp_path, job(executors.Opened(tmp_path), rounds=3), koinon.ray(cpus=0.5, gpus=0.5))
    others = [path.read_text() for path in tmp_path.iterdir() if path.is_file() and path.name != str(os.getpid())]
    assert others == ["0 1", "0 1"]


def test_actors_that_cannot_begin_end_the_run(tmp_path, cluster):
    """With what hinders them, and what to look for."""
    with pytest.raises(
        RunError, match=r"Ray actor 1 at .* could not begin \(AssertionError: not here\): every machine"
    ):
        run(tmp_path, job(Unready()), koinon.ray(workers=1))


def test_what_cannot_be_handed_over_is_refused(tmp_path, cluster):
    """In one line, with what to do."""
    with pytest.raises(JobError, match=r"cannot be handed to a cluster \(cannot pickle '_thread.lock' object\): use"):
        run(tmp_path, job(executors.locked()), koinon.ray(workers=1))


def test_a_cluster_without_room_is_named(tmp_path, second, monkeypatch):
    """There is too little, or others have it: nobody waits in silence, and what was begun goes."""
    with pytest.raises(RunError, match="room for 2 workers of 1 CPUs and 0 GPUs, not for 3: add a node with `ray"):
        run(tmp_path / "small", job(), koinon.ray(workers=3))
    with pytest.raises(RunError, match="room for 0 workers of 2 CPUs and 0 GPUs, not for 1"):
        run(tmp_path / "wide", job(), koinon.ray(cpus=2))
    other = ray.remote(engine._Worker).options(num_cpus=1).remote()
    ray.get(other.arrive.remote([]))
    with monkeypatch.context() as hurried:
        hurried.setattr(engine, "PATIENCE", 20.0)
        with pytest.raises(
            RunError, match=r"no room for 20 s for 1 of 2 workers of 1 CPUs .* see with `ray status` who"
        ):
            run(tmp_path / "busy", job(), koinon.ray(workers=2))
    ray.kill(other)
    run(tmp_path / "free", job(), koinon.ray(workers=2))


def test_a_node_that_dies_costs_its_chunk(tmp_path, second):
    """It runs again on the other node, to the same bits, and one line says so."""
    (marks := tmp_path / "marks").mkdir()
    whole, _ = run(tmp_path / "whole", job(), 1)
    dying = job(executors.loses_its_node(second, marks, round=2))
    model, events = run(tmp_path, dying, koinon.ray(workers=2))
    assert len(list(marks.iterdir())) == 1
    assert model == whole
    (warning,) = [event.values["message"] for event in said(events, "warning")]
    assert "died with its node: its " in warning
    assert "sites run again" in warning
    assert not said(events, "refused")


def test_the_last_node_that_dies_ends_the_run(tmp_path, cluster, monkeypatch):
    """Nobody waits for ever for another; the run folder keeps the last commit."""
    monkeypatch.setattr(engine, "PATIENCE", 20.0)
    (marks := tmp_path / "marks").mkdir()
    last = cluster.add("--num-cpus=1", "--num-gpus=2")
    dying = job(executors.loses_its_node(last, marks, round=2))
    with pytest.raises(RunError, match="no room for 20 s for 1 of 1 workers of 0 CPUs and 2 GPUs"):
        run(tmp_path, dying, koinon.ray(cpus=0, gpus=2))
    (folder,) = tmp_path.glob("run-*")
    assert koinon.tracking.read(folder).info["state"] == "failed"
