"""The launch files: valid by the schemas of their tools, and all of them run one command in one image."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

yaml, jsonschema = pytest.importorskip("yaml"), pytest.importorskip("jsonschema")

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCHEMAS = Path(__file__).parent / "schemas"
BIN = Path(sys.executable).parent
SHELL = ("train.sh", "slurm.sbatch", "tpu_vm.sh")
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


def read(name: str):
    return yaml.safe_load((LAUNCH / name).read_text())


def problems(document, schema: Path) -> list[str]:
    errors = jsonschema.Draft202012Validator(json.loads(schema.read_text())).iter_errors(document)
    return [f"{list(error.absolute_path)}: {error.message}" for error in errors]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = ENVIRONMENT | environment
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_shell_scripts_have_no_faults():
    checked = run("shellcheck", "--severity=style", "--exclude=SC1091", *(str(LAUNCH / name) for name in SHELL))
    assert checked.returncode == 0, checked.stdout


def test_every_launch_file_is_in_the_readme():
    files = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    named = set(re.findall(r"`([\w./]+)`", (LAUNCH / "README.md").read_text()))
    assert files - named == {"README.md", "Dockerfile.dockerignore"}


def test_they_train_the_same_config():
    texts = [(LAUNCH / name).read_text() for name in ("slurm.sbatch", "tpu_vm.sh", "gke/jobset.yaml", "skypilot.yaml")]
    texts.append((LAUNCH / "ray/train_on_ray.py").read_text())
    named = {name for text in texts for name in re.findall(r"configs/\w+\.py:\w+", text)}
    assert all("configs/" in text for text in texts) and len(named) == 1
    file, variant = named.pop().split(":")
    assert import_module(file.removesuffix(".py").replace("/", ".")).get_config(variant)


def test_what_each_host_runs_is_the_main_command():
    ran = run("bash", str(LAUNCH / "train.sh"), "--config.train.stpes=3", CONFIG="configs/large.py", WORKDIR="nowhere")
    assert "unknown key `train.stpes`: did you mean `train.steps`?" in ran.stderr
    assert "CONFIG" in run("bash", str(LAUNCH / "train.sh"), WORKDIR="nowhere").stderr


# --- Kubernetes


def patched(document, patch):
    """`document` after a JSON patch (RFC 6902) of replacements, additions and removals."""
    for operation in patch:
        *parents, last = [int(key) if key.isdigit() else key for key in operation["path"].split("/")[1:]]
        place = document
        for key in parents:
            place = place[key]
        assert operation["op"] == "add" or place[last] is not None
        if operation["op"] == "remove":
            del place[last]
        else:
            place[last] = operation["value"]
    return document


def test_the_jobset_is_valid_with_and_without_tpus():
    for document in (read("gke/jobset.yaml"), patched(read("gke/jobset.yaml"), read("gke/tpu.yaml"))):
        assert not problems(document, SCHEMAS / "jobset.json")
        document["spec"]["replicatedJobs"][0]["template"]["spec"]["replica"] = 1
        assert "'replica' was unexpected" in problems(document, SCHEMAS / "jobset.json")[0]


def test_each_pod_of_the_jobset_knows_its_number_and_on_tpus_jax_finds_it():
    def variables(document) -> dict:
        job = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        return {variable["name"]: variable for variable in job["containers"][0]["env"]}

    gpu = variables(read("gke/jobset.yaml"))
    assert set(gpu) > {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    assert gpu["JAX_COORDINATOR_ADDRESS"]["value"].startswith("$(COORDINATOR):")
    assert set(variables(patched(read("gke/jobset.yaml"), read("gke/tpu.yaml")))) == {"CONFIG", "WORKDIR"}


# --- SkyPilot, Ray, Cloud TPU


def test_the_skypilot_task_is_valid():
    assert not problems(read("skypilot.yaml"), SCHEMAS / "skypilot.json")
    assert problems(read("skypilot.yaml") | {"nodes": 2}, SCHEMAS / "skypilot.json")


def test_skypilot_tells_each_node_its_number(tmp_path):
    printed = tmp_path / "train.sh"
    printed.write_text("env | grep ^JAX_")
    script = read("skypilot.yaml")["run"].replace("/cde_jax/launch/train.sh", str(printed))
    ips = "10.0.0.7\n10.0.0.9"
    ran = run("bash", "-c", script, SKYPILOT_NODE_IPS=ips, SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1")
    given = dict(line.split("=", 1) for line in ran.stdout.split())
    wanted = {"JAX_COORDINATOR_ADDRESS": "10.0.0.7:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert given.items() >= wanted.items()


def test_the_ray_cluster_is_valid():
    ray = pytest.importorskip("ray")
    schema, cluster = Path(ray.__file__).parent / "autoscaler/ray-schema.json", read("ray/cluster.yaml")
    assert not problems(cluster, schema)
    assert problems(cluster | {"workers": 2}, schema)
    assert cluster["available_node_types"]["gpu"]["min_workers"] == cluster["max_workers"]


def test_the_command_for_every_tpu_host_is_whole(tmp_path):
    """With a stand-in for gcloud, which needs an account: the words that it is called with."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{tmp_path}/calls\n[[ $4 != describe ]]')
    gcloud.chmod(0o755)
    path = f"{tmp_path}:{ENVIRONMENT['PATH']}"
    given = {"IMAGE": "registry/cde_jax:1", "SHARE": "10.0.0.2:/share", "WORKDIR": "/shared/my run"}
    ran = run("bash", str(LAUNCH / "tpu_vm.sh"), "--config.train.steps=7", PATH=path, **given)
    assert ran.returncode == 0, ran.stderr
    _, create, mount, train = (tmp_path / "calls").read_text().splitlines()
    assert "--accelerator-type=v6e-64" in create and "10.0.0.2:/share" in mount
    command = train.partition("--command=")[2]
    assert run("bash", "-n", "-c", command).returncode == 0
    assert "-e WORKDIR='/shared/my run'" in command and command.endswith("launch/train.sh --config.train.steps=7")
    assert "IMAGE" in run("bash", str(LAUNCH / "tpu_vm.sh"), PATH=path).stderr


# --- the image


def test_the_image_installs_what_the_makefile_does():
    checked = run("hadolint", str(LAUNCH / "Dockerfile"))
    assert checked.returncode == 0, checked.stdout
    text = (LAUNCH / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = re.findall(r'pip install -c constraints\.txt -e "\.\[([\w,]+)\]"', text)
    assert sorted(installs) == ["cuda,ray,tfds", "tpu,ray,tfds"] and text.count("pip install") == 2
    assert {extra for install in installs for extra in install.split(",")} <= extras.keys()
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"PIP := .*pip install .*-c constraints\.txt", makefile)
    assert makefile.count('$(PIP) --no-compile -e ".[') == 2  # core and dev
    assert f"python:{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['requires-python'][2:]}" in text
