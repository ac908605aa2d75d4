"""Devices and precision, memory, and the version of the code that a figure comes from."""

from flags import ROOT, InputError

import subprocess
import sys

import pytest
import torch

import utils
from fast.training import compiled
from support import machine


def test_devices_and_precisions():
    cpu = torch.device("cpu")
    assert utils.get_device("cpu") == cpu
    assert utils.get_dtype("fp32", cpu) == torch.float32
    assert utils.get_dtype("bf16", cpu) == torch.bfloat16
    assert utils.get_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(InputError, match="--device"):
                utils.get_device(name)


@pytest.mark.parametrize(
    ("name", "avx512_bf16", "amx", "fast"),
    [
        ("AMD EPYC", True, False, True),
        ("AMD EPYC", False, False, False),
        ("Intel(R) Xeon(R) Processor", True, True, True),
        ("Intel(R) Xeon(R) Processor", True, False, False),
    ],
)
def test_bf16_is_taken_where_it_is_fast(monkeypatch, name, avx512_bf16, amx, fast):
    monkeypatch.setattr(utils.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(utils, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    cpu = torch.device("cpu")
    assert utils.has_fast_bf16(cpu) == fast
    assert utils.get_dtype("auto", cpu) == (torch.bfloat16 if fast else torch.float32)


def test_short_runs_are_not_compiled():
    """Compiling takes a minute, more than it gains on 200,000 images."""
    network = torch.nn.Conv2d(3, 4, 3)
    assert compiled(network, 200_000, 1.0) is network
    assert compiled(network, 800_000, 0.25) is network


def test_peak_memory_counts_what_was_held():
    """In a process of its own, whose peak nothing else has raised."""
    code = """if True:
        import torch
        from support import machine
        cpu = torch.device("cpu")
        before = machine.peak_memory(cpu)
        held = torch.ones(2**28, dtype=torch.uint8)
        del held
        print(machine.peak_memory(cpu) - before)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(out.stdout) == pytest.approx(0.25, abs=0.03)


def test_a_machine_is_described_by_plain_values():
    about = machine.machine(torch.device("cpu"))
    assert about["torch"] == str(torch.__version__)
    assert about["kind"] == "cpu"
    assert about["device"] == utils.cpu_name()
    assert all(type(value) in (str, int) for value in about.values())


def test_the_commit_says_where_the_code_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None  # no checkout

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "sub").mkdir()
    code, page = tmp_path / "sub" / "code.py", tmp_path / "page.md"
    for path in (code, page):
        path.write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")[:10]
    assert machine.commit() == commit
    page.write_text("b")
    (tmp_path / "new.py").write_text("of no commit, so no code of it")
    assert machine.commit() == commit
    code.write_text("b")
    assert machine.commit() == f"{commit}+"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert machine.commit() is None
