import os
import resource
import subprocess
import sys

import pytest

from momentum_lm import __version__
from momentum_lm.cli.main import COMMANDS, main


def cpu_seconds(run):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def test_help_is_fast_and_lists_what_there_is(run_cli):
    base = min(cpu_seconds(lambda: run_cli(["python", "-c", "pass"]))[0] for _ in range(3))
    runs = [cpu_seconds(lambda: run_cli(["momentum-lm", "--help"], fresh=True)) for _ in range(3)]
    seconds, result = min(runs, key=lambda pair: pair[0])
    assert result.returncode == 0 and result.stdout.startswith("usage: momentum-lm COMMAND")
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)
    assert 0 < seconds - base < 0.3


def test_help_imports_nothing_heavy(run_cli):
    code = "import sys; from momentum_lm.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    modules = run_cli(["python", "-c", code]).stdout.splitlines()[-1]
    assert "'momentum_lm.cli.main'" in modules
    for heavy in ("torch", "numpy", "fairseq", "matplotlib", "datasets", "argparse"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name, run_cli):
    result = run_cli(["momentum-lm", name, "--help"])
    assert result.returncode == 0 and result.stdout.startswith(f"usage: momentum-lm {name}"), result.stderr


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["docter"], "error: momentum-lm has no command 'docter'; did you mean doctor?\n"),
        (["--frobnicate"], "error: momentum-lm has no command '--frobnicate'; choose one of "),
        ([""], "error: momentum-lm has no command ''; choose one of "),
    ],
)
def test_unknown_command_is_one_line(argv, error, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(error) and err.count("\n") == 1


def test_no_command_shows_the_usage(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: momentum-lm COMMAND")


def test_version(run_cli, capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == run_cli(["momentum-lm", "--version"]).stdout == f"momentum-lm {__version__}\n"


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_a_pipe_that_is_closed_ends_it_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "momentum_lm.cli.main", "--help"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
