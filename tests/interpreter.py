"""An interpreter that has imported torch and fairseq, and forks a child for each command: a start costs 0.1 s instead of 3.

``python interpreter.py SOCKET ENVIRONMENT...`` serves; ``Interpreter`` starts one and asks it. The child runs the installed script as
Python would: its own arguments, environment, folder, standard output and error, exit status and exit handlers.
"""

import array
import atexit
import contextlib
import gc
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# Read at import by nothing that is imported below.
HARMLESS = {"PYTEST_CURRENT_TEST", "PATH", "COLUMNS", "PWD", "OLDPWD", "TMPDIR", "HOME"}
# Not fairseq_cli: its modules configure logging when they are imported, each in its own way.
IMPORTED = """fairseq.trainer fairseq.sequence_generator fairseq.dataclass.initialize momentum_lm.cli.main transformers.models.auto
torch.utils.tensorboard matplotlib.figure""".split()


class Interpreter:
    """``Interpreter(environment).run(command, environment, cwd, timeout)`` -> subprocess.CompletedProcess with text."""

    def __init__(self, environment):
        self.environment = environment
        self.address = tempfile.mktemp(prefix="interpreter-")
        command = [sys.executable, __file__, self.address]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout.readline() == b"ready\n"

    def runs(self, command, environment):
        """Whether a child does the same as a fresh process: a script of this Python, and no variable that matters at import."""
        changed = {name for name, _ in set(environment.items()) ^ set(self.environment.items())}
        with open(command[0], "rb") as file:
            first = file.readline(1000)
        return changed <= HARMLESS and first.startswith(b"#!" + os.path.dirname(sys.executable).encode() + b"/python")

    def run(self, command, environment, cwd, timeout):
        request = {"command": command, "environment": environment, "cwd": str(cwd)}
        with socket.socket(socket.AF_UNIX) as connection, contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
            connection.connect(self.address)
            descriptors = array.array("i", [file.fileno() for file in outputs])
            connection.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            connection.sendall(json.dumps(request).encode() + b"\n")
            answers = connection.makefile()
            child = int(answers.readline())
            connection.settimeout(timeout)
            try:
                status = int(answers.readline())
            except TimeoutError:
                os.kill(child, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout) from None
            for file in outputs:
                file.seek(0)
            texts = [file.read().decode().replace("\r\n", "\n").replace("\r", "\n") for file in outputs]
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *texts)

    def close(self):
        self.process.kill()
        self.process.wait()
        Path(self.address).unlink(missing_ok=True)


def serve(address):
    """Answer until killed. Each request has a process that forks the command's, so that two of them can run at once."""
    for name in IMPORTED:
        __import__(name)
    # One of fairseq's tasks configures logging when it is imported, to no effect where a command has done so before.
    logging.basicConfig(level=logging.WARNING, handlers=[], force=True)
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        parent = os.getppid()
        listener.settimeout(5)
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                answer(connection)
                os._exit(0)
            connection.close()


def answer(connection):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
    request = json.loads(connection.makefile().readline())
    child = os.fork()
    if child == 0:
        connection.close()
        for target, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, target)
            os.close(descriptor)
        leave(script(**request))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{child}\n".encode())
    connection.sendall(f"{os.waitpid(child, 0)[1]}\n".encode())


def script(command, environment, cwd):
    """The exit status of a script that runs as ``__main__``; what it raises is shown as Python shows it."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = command
    sys.orig_argv = [sys.executable, *command]
    sys.path[0] = os.path.dirname(command[0])
    sys.modules.pop(Path(__file__).stem, None)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename != command[0]:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    return 0


def leave(status):
    """End as the interpreter ends: threads, exit handlers, output."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 255)


if __name__ == "__main__":
    serve(sys.argv[1])
