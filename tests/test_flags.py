"""The flags of every command: --help and a wrong flag are answered at once, before torch is imported."""

import flags
from flags import COMMANDS, ROOT, InputError

import argparse
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NEEDED = {"defend.py": ["--defense", "ft"]}
every_command = pytest.mark.parametrize("script", COMMANDS)


def ask(script, *words, cwd="/"):
    """Run a command; return (exit status, standard output, its lines on standard error, modules that it imported)."""
    command = [sys.executable, "-X", "importtime", str(ROOT / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return done.returncode, done.stdout, [line for line in lines if not line.startswith("import time:")], imported


def test_every_script_is_a_command():
    assert set(COMMANDS) == {path.name for path in ROOT.glob("*.py") if "flags.run(main)" in path.read_text()}


@every_command
def test_help_comes_at_once_and_explains_every_flag(script):
    status, out, err, imported = ask(script, "--help")
    assert (status, err) == (0, [])
    assert "flags" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "numpy", "PIL", "matplotlib")}
    for action in flags.parser(script)._actions:
        assert action.option_strings[-1] in out
        assert action.help


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="Windows does not say what a child used")
@every_command
def test_help_takes_no_half_second(script):
    """In CPU time, because the machine may be busy."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), "--help"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_utime + usage.ru_stime < 0.5


@every_command
@pytest.mark.parametrize(
    "words", [["--device", "tpu"], ["--nonsense"], ["--datadir"], ["--results-\nof", "a\nb"], ["stray"]]
)
def test_a_wrong_flag_ends_in_one_line_and_status_2(script, words):
    status, out, err, imported = ask(script, *NEEDED.get(script, []), *words)
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"{script}: error: ")
    assert words[0].split()[0] in err[0]
    assert "torch" not in imported


@pytest.mark.parametrize("words", [[], ["--defense", "no_such"]])
def test_defend_asks_which_defense(words):
    status, _, err, imported = ask("defend.py", *words)
    assert (status, len(err)) == (2, 1)
    assert "--defense" in err[0]
    assert "torch" not in imported


def test_a_command_is_known_by_its_place_too(tmp_path):
    """A user's script with the name of a command has its own flags."""
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import flags; print(sys.argv[1:])")
    done = subprocess.run([sys.executable, str(script), "--mine"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['--mine']\n", "")


def test_the_authors_names_and_defaults():
    args = vars(flags.parser("unit.py").parse_args([]))
    want = {"dataset": "cifar10", "network": "resnet18", "attack": "badnet", "seed": 1024, "batch_size": 128}
    want |= {"target": 0, "lr": 1e-3, "n_steps": 300, "acc_degrade": 0.03}
    assert {k: args[k] for k in want} == want
    train = flags.parser("train.py").parse_args([])
    assert (train.epochs, train.sampling, train.lr, train.weight_decay) == (30, "resampled", 0.1, 5e-4)


@pytest.mark.parametrize("removed", ["--init", "--average", "--small_epochs", "--compile"])
def test_what_is_gone_is_unknown(removed, capsys):
    with pytest.raises(SystemExit) as left:
        flags.parser("train.py").parse_args([removed, "1"])
    assert left.value.code == 2
    assert f"unrecognized arguments: {removed}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parse", "text", "reason"),
    [
        (flags.COUNT, "0", "at least 1"),
        (flags.COUNT, "2.5", "whole number"),
        (flags.COUNT, "1" + 400 * "0", "too large"),
        (flags.SEED, "-1", "at least 0"),
        (flags.SEED, str(2**32), "at most"),
        (flags.SHARE, "0", "above 0"),
        (flags.SHARE, "1.5", "at most 1"),
        (flags.POSITIVE, "-1", "above 0"),
        (flags.POSITIVE, "nan", "finite"),
        (flags.POSITIVE, "inf", "finite"),
        (flags.POSITIVE, "1e999", "finite"),
        (flags.POSITIVE, "much", "not a number"),
    ],
)
def test_numbers_out_of_range(parse, text, reason):
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        parse(text)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (flags.COUNT, "1", 1),
        (flags.SEED, "4294967295", 2**32 - 1),
        (flags.SHARE, "1", 1),
        (flags.POSITIVE, "2e-9", 2e-9),
    ],
)
def test_numbers_at_the_edge(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (None, 0, ""),
        (InputError("there is no such file; give another"), 2, "error: there is no such file; give another\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_the_outcome_is_the_exit_status(end, status, said, capsys):
    def main():
        if end is not None:
            raise end

    with pytest.raises(SystemExit) as left:
        flags.run(main)
    assert left.value.code == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")]
)
def test_too_little_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        flags.run(main)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--batch_size" in err


def test_a_path_that_cannot_be_asked_for_is_one_line(capsys):
    def refused():
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/v.pt")

    long = Path("x" * 300)
    for main, said in ((long.is_file, f"{long}: File name too long"), (refused, "/closed/v.pt: Permission denied")):
        with pytest.raises(SystemExit) as left:
            flags.run(main)
        assert left.value.code == 2
        assert re.fullmatch(f"error: cannot use .*{said}; give another path\n", capsys.readouterr().err)


def test_a_name_that_is_no_text_can_be_said(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, "utf-8", errors="strict"))
    with pytest.raises(SystemExit) as end:
        flags.run(lambda: print("m\udcff.pt", flush=True))
    assert end.value.code == 0
    assert file.getvalue() == b"m\\udcff.pt\n"


def test_a_fault_of_ours_keeps_its_traceback():
    code = "import flags; flags.run(lambda: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert re.search(r"Traceback .*ZeroDivisionError", done.stderr, re.DOTALL)
