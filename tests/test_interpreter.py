"""Commands forked from a warm interpreter do what fresh processes do."""

import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "command",
    [
        ["fairseq-train", "--help"],
        ["fairseq-train", "nowhere", "--task", "language_modeling", "--arch", "momentum_lm_tiny", "--cpu"],
        ["fairseq-eval", "--task", "nothing"],
    ],
    ids=" ".join,
)
def test_equals_a_fresh_process(command, run_cli):
    forked, fresh = run_cli(command), run_cli(command, fresh=True)
    assert (forked.forked, fresh.forked, forked.returncode) == (True, False, fresh.returncode)
    for ours, theirs in ((forked.stdout, fresh.stdout), (forked.stderr, fresh.stderr)):
        ours, theirs = (re.sub(r"(?m)^\d{4}-.*? \|", "", text) for text in (ours, theirs))  # without the times of logs
        noise = [
            line for line in theirs.splitlines(keepends=True) if "Please install tensorboardX" in line
        ]  # said by an import
        assert ours == "".join(line for line in theirs.splitlines(keepends=True) if line not in noise)


@pytest.fixture
def script(tmp_path, cli_command):
    """script(text) -> the path of a program of this interpreter's environment."""

    def write(text):
        shebang = Path(cli_command(["momentum-lm"])[0][0]).read_text().splitlines(keepends=True)[0]
        path = tmp_path / "program.py"
        path.write_text(shebang + text)
        path.chmod(0o755)
        return path

    return write


PROGRAM = """
import atexit, os, sys, threading, torch
atexit.register(print, "last")
threading.Timer(0.1, print, ["thread"]).start()
print(sys.argv[1:], sys.stdin.read(), os.getcwd(), os.environ["COLUMNS"], sys.path[0], __name__, __file__)
print(len(list(os.scandir("/proc/self/fd"))), file=sys.stderr)
torch.ones(300, 300).requires_grad_().mm(torch.ones(300, 300)).sum().backward()
"""
ENDS = {
    "import sys; sys.exit(7)": 7,
    "import sys; sys.exit('a message')": 1,
    "import os; os.kill(os.getpid(), 11)": -11,
    "raise ValueError('told')": 1,
    "pass": 0,
}


def test_a_program_sees_what_it_would_see(tmp_path, script, run_cli):
    path = script(PROGRAM)
    forked, fresh = (
        run_cli([path, "a", "b c"], env={"COLUMNS": 77}, cwd=tmp_path, fresh=fresh, input="in")
        for fresh in (False, True)
    )
    assert forked.forked
    assert forked.stdout == fresh.stdout == f"['a', 'b c'] in {tmp_path} 77 {tmp_path} __main__ {path}\nthread\nlast\n"


@pytest.mark.parametrize("text", ENDS)
def test_the_exit_status(text, script, run_cli):
    path = script(text)
    forked, fresh = run_cli([path]), run_cli([path], fresh=True)
    assert forked.returncode == fresh.returncode == ENDS[text]
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_time_limit_and_two_at_once(script, run_cli):
    path = script("import time; time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        run_cli([path], timeout=0.5)
    quick = script("import time; time.sleep(0.3); print(1)")
    results = []
    threads = [threading.Thread(target=lambda: results.append(run_cli([quick]).stdout)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["1\n"] * 3


def test_python_runs_scripts_and_modules(tmp_path, run_cli):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    words = ["python", path, "a"], ["python", "-m", "momentum_lm.cli.main", "--version"]
    for command in words:
        forked, fresh = (run_cli(command, env={"COLUMNS": 77}, cwd=tmp_path, fresh=fresh) for fresh in (False, True))
        assert (forked.forked, forked.returncode, forked.stdout) == (True, 0, fresh.stdout)
        assert not forked.stderr or forked.stderr.splitlines()[-1] == fresh.stderr.splitlines()[-1]


def test_shells_find_the_forking_programs(tmp_path, cli_command, script):
    """Their streams, exit status and signals are the child's; so is the end of one that is killed."""
    path = script("import os, sys, time; print(flush=True); os.kill(os.getpid(), int(sys.argv[1])); time.sleep(60)")
    command, environment = cli_command(
        ["/bin/sh", "-c", "momentum-lm --version | cat; momentum-lm report nowhere"], warm=True
    )
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (
        done.stdout.startswith("momentum-lm")
        and done.stderr.startswith("error: cannot read nowhere")
        and done.returncode == 2
    )
    command, environment = cli_command(["python", path, "15"], warm=True)
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == -15
    command, environment = cli_command(["python", path, "0"], warm=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        process.stdout.readline()
        process.send_signal(number)
        assert process.communicate(timeout=30)[0] == b"" and process.returncode == -number


def test_variables_that_matter_at_import_need_a_fresh_process(run_cli):
    assert not run_cli(["momentum-lm", "--version"], env={"HF_HOME": "/nowhere"}).forked
    assert not run_cli(["python", "-c", "pass"]).forked


def test_what_a_test_leaves_in_the_environment_is_gone():
    os.environ["MOMENTUM_LM_LEFT"] = "1"  # as code under test does


def test_commands_are_forked_after_it(run_cli):
    assert "MOMENTUM_LM_LEFT" not in os.environ and run_cli(["momentum-lm", "--version"]).forked


def test_commands_are_forked_after_a_model_was_loaded_here(make_lm, run_cli):
    make_lm()
    assert run_cli(["momentum-lm", "--version"]).forked
