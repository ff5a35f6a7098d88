"""An interpreter that has imported torch and fairseq, and forks a child for each command: a start costs 0.1 s instead
of 3.

``Interpreter(environment)`` starts one. Its ``run`` is subprocess.run; its ``bin`` is a folder of programs for PATH,
shells and subprocess.Popen: each hands its arguments and its standard streams to a child, passes signals on to it, ends
with its exit status, and takes it along when it is killed. The child runs an installed script or ``python SCRIPT`` as
Python would: its own arguments, environment, folder, streams, exit status and exit handlers.
"""

import array
import itertools
import json
import os
import socket
import sys

# Variables that nothing reads while it is imported, and beginnings of names of such variables.
HARMLESS = set(
    "PATH COLUMNS PWD OLDPWD TMPDIR HOME SHLVL _ CUDA_VISIBLE_DEVICES GPUS RESTARTS NODES HEAD RECIPE "
    "LRU_CACHE_CAPACITY ONEDNN_PRIMITIVE_CACHE_CAPACITY".split()
)
HARMLESS |= {f"{kind}{name}" for kind in ("", "LOCAL_", "ROLE_", "GROUP_") for name in ("RANK", "WORLD_SIZE", "NAME")}
PREFIXES = ("PYTEST_", "PIP_", "TORCHELASTIC_", "MASTER_", "TORCH_DISABLE_SHARE_RDZV", "TORCH_NCCL_ASYNC")
MODULES = ("momentum_lm.", "torch.distributed.run")  # what is forked of ``python -m``
# Not fairseq_cli: its modules configure logging when they are imported, each in its own way.
IMPORTED = """fairseq.trainer fairseq.sequence_generator fairseq.dataclass.initialize momentum_lm.cli.main
transformers.models.auto torch.utils.tensorboard torch.distributed.run torch._dynamo matplotlib.figure
pyarrow.parquet datasets sentencepiece""".split()
CLIENT = """#!{python} -IS
import sys
sys.path.insert(0, {folder!r})
import interpreter
interpreter.stand_in({address!r}, {program!r})
"""


def forkable(command, environment, server, code=False):
    """Whether a child of the ``server`` (its environment) does the same as a fresh process: a script of this Python,
    and no variable that matters at import. ``code``: ``python -c`` is such a script; often it is there to see what an
    import does.
    """
    if any("user" in flag and value.rstrip("/").endswith("momentum_lm") for flag, value in itertools.pairwise(command)):
        return False  # --user-dir: another copy of what is imported here
    changed = {name for name, _ in set(environment.items()) ^ set(server.items())} - HARMLESS
    if any(not name.startswith(PREFIXES) for name in changed):
        return False
    if is_python(command[0]):
        if command[1:2] == ["-c"]:
            return code
        return len(command) > 1 and (
            command[1].endswith(".py") or (command[1] == "-m" and command[2].startswith(MODULES))
        )
    with open(command[0], "rb") as file:
        first = file.readline(1000)
    return first.startswith(b"#!" + os.path.dirname(sys.executable).encode() + b"/python") and b" " not in first


def is_python(path):
    return os.path.dirname(path) == os.path.dirname(sys.executable) and os.path.basename(path).startswith("python")


class Request:
    """A command that a child of the server at ``address`` runs with the three open files ``streams``; ``child`` is its
    process id.
    """

    def __init__(self, address, command, environment, cwd, streams):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        descriptors = array.array("i", streams)
        self.connection.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        request = {"command": command, "environment": environment, "cwd": str(cwd)}
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        self.answers = self.connection.makefile()
        self.child = int(self.answers.readline())

    def wait(self, timeout=None):
        """The exit status, negative for a signal; TimeoutError where it takes longer."""
        self.connection.settimeout(timeout)
        return os.waitstatus_to_exitcode(int(self.answers.readline()))

    def close(self):
        self.answers.close()
        self.connection.close()


def stand_in(address, program):
    """Be ``program``: a child of the server runs it, or where that would not be the same, the program itself."""
    import signal

    environment, command = dict(os.environ), [program, *sys.argv[1:]]
    with open(address + ".json") as file:
        server = json.load(file)
    if not forkable(command, environment, server):
        os.execv(program, command)
    request = Request(address, command, environment, os.getcwd(), (0, 1, 2))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(request.child, number))
    status = request.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


class Interpreter:
    """``Interpreter(environment, scripts)``: a server with that environment, and stand-ins in ``bin`` for the programs
    in ``scripts``.
    """

    def __init__(self, environment, scripts):
        import subprocess
        import tempfile
        from pathlib import Path

        self.environment = environment
        self.folder = tempfile.TemporaryDirectory(prefix="interpreter-")
        self.address = f"{self.folder.name}/socket"
        Path(self.address + ".json").write_text(json.dumps(environment))
        self.bin = Path(self.folder.name, "bin")
        self.bin.mkdir()
        names = [
            "fairseq-eval",
            "momentum-lm",
            "torchrun",
            "python",
            "lm_eval",
            *(p.name for p in Path(scripts).glob("fairseq-*")),
        ]
        for program in (Path(scripts, name) for name in names):
            if program.exists():
                path = self.bin / program.name
                path.write_text(
                    CLIENT.format(
                        python=sys.executable,
                        folder=os.path.dirname(__file__),
                        address=self.address,
                        program=str(program),
                    )
                )
                path.chmod(0o755)
        command = [sys.executable, __file__, self.address]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout.readline() == b"ready\n"

    def runs(self, command, environment, code=False):
        """Whether ``run`` does the same as subprocess.run (see :func:`forkable`)."""
        return forkable(command, environment, self.environment, code)

    def run(self, command, environment, cwd, timeout, text=""):
        """subprocess.CompletedProcess with text; ``text`` is the standard input."""
        import contextlib
        import signal
        import subprocess
        import tempfile

        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            files[0].write(text.encode())
            files[0].seek(0)
            request = Request(self.address, command, environment, cwd, [file.fileno() for file in files])
            stack.callback(request.close)
            try:
                status = request.wait(timeout)
            except TimeoutError:
                os.kill(request.child, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout) from None
            for file in files:
                file.seek(0)
            texts = [file.read().decode().replace("\r\n", "\n").replace("\r", "\n") for file in files[1:]]
        return subprocess.CompletedProcess(command, status, *texts)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def serve(address):
    """Answer until killed. Each request has a process that forks the command's, so that two of them can run at once."""
    import gc
    import logging
    import signal

    for name in IMPORTED:
        __import__(name)
    warm_up()
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
                answer(connection, f"{os.path.dirname(address)}/bin")
                os._exit(0)
            connection.close()


def warm_up():
    """What hydra and inspect keep from their first use on, which fairseq's commands wait for."""
    import inspect

    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.plugins import Plugins

    Plugins.instance()
    values = [
        "1",
        "-1",
        "1e-3",
        "0.5",
        "null",
        "true",
        "'(0.9, 0.98)'",
        "'/b-c/d_e.f'",
        "[1,0.5]",
        "['b,c','d']",
        "'b c:d'",
        "b_c",
        "''",
    ]
    OverridesParser.create().parse_overrides([f"task.a_b={value}" for value in values])
    inspect.stack()


def answer(connection, programs):
    import select
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    child = os.fork()
    if child == 0:
        connection.close()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        for descriptor in descriptors:
            os.close(descriptor)
        leave(script(**request, programs=programs))
    for descriptor in descriptors:
        os.close(descriptor)
    tell(connection, child)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:  # the caller is gone: killed, perhaps
        os.kill(child, signal.SIGKILL)
    tell(connection, os.waitpid(child, 0)[1])


def tell(connection, number):
    import contextlib

    with contextlib.suppress(OSError):  # the caller is gone
        connection.sendall(f"{number}\n".encode())


def script(command, environment, cwd, programs):
    """The exit status of a script that runs as ``__main__``; what it raises is shown as Python shows it."""
    import runpy
    import tempfile

    python = is_python(command[0])
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if environment.get("PATH", "").startswith(
        f"{programs}:"
    ):  # then what it finds beside its interpreter is forked too
        sys.executable = f"{programs}/python"
    words = command[1:] if python else command
    module = words[1] if words[0] == "-m" else None
    program = words[0]
    sys.argv = words if module is None else words[1:]
    sys.orig_argv = [sys.executable, *words]
    sys.path[0] = os.path.dirname(os.path.abspath(program)) if module is None else cwd
    sys.modules.pop("interpreter", None)
    try:
        if program == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            sys.modules["__main__"] = type(sys)("__main__")
            exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        elif module is None:
            runpy.run_path(program, run_name="__main__")
        else:
            sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename != program:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    return 0


def leave(status):
    """End as the interpreter ends: threads, exit handlers, output."""
    import atexit
    import contextlib
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 255)


if __name__ == "__main__":
    serve(sys.argv[1])
