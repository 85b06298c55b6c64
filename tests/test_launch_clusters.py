"""The launch files start a run of two processes: a real SLURM and a real Ray cluster, both on this machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_stages import config_of
from tiny_run import write_data

from cde_jax.stages.run import run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
DAEMONS = ("munged", "slurmctld", "slurmd")
STEPS = 12
# Two plan batches of a step, one for each process, which has one device.
TRAIN = {"batches_per_step": 2, "mesh": (2, 1), "steps": STEPS, "text_lengths": 1}
FLAGS = [f"--config.train.{name}={value}" for name, value in TRAIN.items()]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
}


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def lines(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def check_trained(workdir: Path) -> None:
    """All steps are logged once, by one process, and both devices took part."""
    assert [line["step"] for line in lines(workdir) if "loss" in line] == list(range(1, STEPS + 1))
    assert json.loads((workdir / "training.json").read_text())["placement"]["devices"].startswith("2 x cpu")


# --- SLURM


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@pytest.fixture
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of commands to a SLURM of one node, this machine, with 8 GPUs that it is only told of."""
    path = ENVIRONMENT["PATH"]
    if missing := [name for name in DAEMONS if not shutil.which(name, path=path)]:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): on Debian slurm-wlm and munge")
    if os.geteuid():
        pytest.skip("SLURM's daemons are started as root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    gpus = [folder / f"gpu{number}" for number in range(8)]
    for gpu in gpus:
        gpu.touch()
    host, (controller, daemon) = socket.gethostname().partition(".")[0], free_ports(2)
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        "SlurmdPort": daemon,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",
        "GresTypes": "gpu",
        "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs=8 Gres=gpu:8",
        "PartitionName": "main Nodes=ALL Default=YES State=UP",
    }
    (folder / "slurm.conf").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={host} Name=gpu File={folder}/gpu[0-7]\n")
    environment = ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf")}
    files = ("key-file=munge.key", "socket=munge.socket", "pid-file=munge.pid", "log-file=munge.log", "seed-file=seed")
    munge = [f"--{name}={folder}/{file}" for name, file in (pair.split("=") for pair in files)]
    commands = [["munged", "--force", *munge]]
    commands += [[name, "-f", str(folder / "slurm.conf"), "-L", str(folder / f"{name}.log")] for name in DAEMONS[1:]]
    try:
        for command in commands:
            subprocess.run(command, env=environment, check=True)
        yield environment
    finally:
        for name in ("slurmd", "slurmctld", "munge"):
            if (file := folder / f"{name}.pid").exists():
                os.kill(int(file.read_text()), signal.SIGTERM)


def call(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(environment: dict[str, str], job: str) -> str:
    described = call(environment, "scontrol", "show", "job", job)
    return described.partition("JobState=")[2].partition(" ")[0]


def wait(environment: dict[str, str], job: str, log: Path, until) -> None:
    deadline = time.monotonic() + 400
    while not until():
        said = log.read_text()[-3000:] if log.exists() else ""
        assert state(environment, job) in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), said
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def test_slurm_runs_two_processes_and_goes_on_after_it_stopped_them(slurm, data, tmp_path):
    log, workdir = tmp_path / "log", tmp_path / "run"
    environment = slurm | {"CONFIG": f"tests/tiny_run.py:{data}", "WORKDIR": str(workdir)}
    submit = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", f"--output={log}", "launch/slurm.sbatch"]
    job = call(environment, *submit, *FLAGS)
    wait(slurm, job, log, lambda: len(lines(workdir)) >= 3)
    call(slurm, "scancel", "--signal=TERM", job)  # as --signal=TERM does before the end of --time
    wait(slurm, job, log, lambda: state(slurm, job) == "COMPLETED")
    stopped_at = lines(workdir)[-1]["step"]
    job = call(environment, *submit, *FLAGS)
    wait(slurm, job, log, lambda: state(slurm, job) == "COMPLETED")
    check_trained(workdir)
    assert (workdir / "export/model.safetensors").exists()
    assert stopped_at == STEPS or f"going on from checkpoint {stopped_at}" in log.read_text()


# --- Ray


def test_ray_trains_on_two_nodes(data, tmp_path):
    pytest.importorskip("ray.train")
    list(
        run(config_of(data, **{f"train__{name}": value for name, value in TRAIN.items()}), tmp_path / "run", "prepare")
    )
    script = """
import os, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
environment = os.environ | {"RAY_ADDRESS": cluster.address}
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=environment).returncode)
"""
    command = ["launch/ray/train_on_ray.py", "--hosts=2", f"--config=tests/tiny_run.py:{data}", *FLAGS]
    command += [f"--workdir={tmp_path / 'run'}", "--stage=train"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        cwd=ROOT,
        # Ray's workers run at niceness 15, and would hardly run at all on a busy machine.
        env=ENVIRONMENT | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300", "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_trained(tmp_path / "run")
