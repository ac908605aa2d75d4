"""How the tests run the commands: in a process of their own, or within this one, on small networks and the sample."""

from flags import ROOT

import os
import subprocess
import sys

import defend
import unit

SMALL = ["--dataset", "cifar10_sample", "--device", "cpu", "--precision", "fp32"]
TRAIN = [*SMALL, "--width", "0.0625", "--epochs", "3", "--batch_size", "50"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def command(script, *args, launcher=(), **kwargs):
    """Start a script in another folder than its own; with TORCHRUN in two processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=kwargs.pop("cwd", "/"), env=env, **kwargs,
    )  # fmt: skip


def _places(victim_file, tmp_path):
    results = str(tmp_path / "results")
    return [*SMALL, "--ckpt", str(victim_file), "--out", str(tmp_path / "d.pt"), "--results", results]


def run_unit(victim_file, tmp_path, *flags):
    """Run unit.py in this process on the small victim."""
    unit.main([*_places(victim_file, tmp_path), "--outdir", str(tmp_path), *flags])


def run_defend(victim_file, tmp_path, *flags):
    """Run defend.py in this process on the small victim."""
    defend.main([*_places(victim_file, tmp_path), *flags])
