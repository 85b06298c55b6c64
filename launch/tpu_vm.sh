#!/usr/bin/env bash
# bash launch/tpu_vm.sh: makes a TPU slice and trains on all its hosts; the same command goes on after an interruption.
# Needs gcloud, the image of launch/Dockerfile (target tpu), and an NFS share, for every host writes to WORKDIR.
TPU=${TPU:-cde-jax} ZONE=${ZONE:-us-east5-b}
ACCELERATOR=${ACCELERATOR:-v6e-64} RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} # v5e: v5litepod-64, v2-alpha-tpuv5-lite
IMAGE=${IMAGE:?the image of launch/Dockerfile, target tpu} SHARE=${SHARE:?an NFS share, ADDRESS:/PATH}
CONFIG=${CONFIG:-configs/large.py:isolated} WORKDIR=${WORKDIR:-/shared/large}

set -euo pipefail
at=("$TPU" --zone="$ZONE")
gcloud compute tpus tpu-vm describe "${at[@]}" >/dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "${at[@]}" --accelerator-type="$ACCELERATOR" --version="$RUNTIME"
on_every_host() { gcloud compute tpus tpu-vm ssh "${at[@]}" --worker=all --command="$1"; }
on_every_host "sudo mkdir -p /shared && (mountpoint -q /shared || sudo mount -t nfs '$SHARE' /shared)"
# --privileged and the host's network: the TPU's devices, and how JAX finds the other hosts.
on_every_host "sudo docker run --rm --privileged --net=host -v /shared:/shared \
  -e CONFIG='$CONFIG' -e WORKDIR='$WORKDIR' '$IMAGE' bash launch/train.sh $*"
