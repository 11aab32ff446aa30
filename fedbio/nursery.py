"""Start scripts of several sites on one machine from one process that has loaded their libraries.

``python -m fedbio.nursery FD MODULE...`` loads the modules and waits for scripts on the socket with that number,
which it has inherited; each script is a fork of it, and thus has at once what it would have loaded for seconds, as a
process of its own. ``python nursery.py SOCKET SCRIPT...`` has a script run there and stands for it: it ends as the
script does, SIGTERM is passed on, and when it is killed, the script is, with all that it has started. If there is no
nursery, or the script's environment says other things to its libraries, it runs the script itself.

What a fork has from the nursery is what a new interpreter has after the same imports; NumPy's old generator, which
begins with the system's entropy, is seeded anew. This module imports nothing but the standard library: who stands for a
script starts at once.
"""

from __future__ import annotations

__all__ = ["NURSERY", "nursery", "nursery_command", "preloadable"]

import contextlib
import importlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

NURSERY = "FEDBIO_NURSERY"
"""Environment variable with the path of the nursery's socket."""

HEAVY = ("numpy", "scipy", "sklearn", "torch", "lightning", "pytorch_lightning", "transformers")
"""Libraries that take long to load and start no threads by that."""

ASK_S = 10.0
"""Seconds in which who has connected says what it wants."""

STOP_S = 10.0
"""Seconds in which a nursery, which may be loading a library, ends itself and all scripts."""

KILL_ALL = signal.SIGUSR1
"""Has a nursery kill all scripts, and everything that they have started, and end."""

_IMPORT = re.compile(rf"^(?:import|from)\s+({'|'.join(HEAVY)})\b", re.MULTILINE)
_READ_ON_IMPORT = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_", "CUDA_", "HF_", "TRANSFORMERS_",
                   "LD_", "PYTHON")  # fmt: skip
_TERMINATE, _REFUSED = b"T", b"refused"
_SIZE_BYTES = 4


def preloadable(scripts: Iterable[str]) -> list[str] | None:
    """Return the libraries that scripts with these texts may find loaded.

    None if one of them looks at its environment, which may be to tell a library something before it is imported: such
    scripts need interpreters of their own.

    Examples
    --------
    >>> preloadable(["import torch", "import os"])
    ['torch']
    >>> preloadable(["import os\\nos.environ['OMP_NUM_THREADS'] = '4'\\nimport torch"]) is None
    True
    """
    texts = list(scripts)
    if any("environ" in text or "putenv" in text for text in texts):
        return None
    return sorted({name for text in texts for name in _IMPORT.findall(text)})


@contextlib.contextmanager
def nursery(libraries: Iterable[str], log: str | os.PathLike[str], *, threads: int) -> Iterator[str]:
    """Offer a nursery for scripts, and end it.

    Parameters
    ----------
    libraries : iterable of str
        Modules to load, beside this package's own for scripts; see `preloadable`.
    log : path
        Gets what is said while libraries are loaded.
    threads : int
        With which each script computes; libraries learn it when they are loaded.

    Yields
    ------
    str
        Path of its socket, the value of `NURSERY` for those who start scripts; it may be asked at once.
    """
    folder = tempfile.mkdtemp(prefix="fedbio-")
    path = f"{folder}/nursery"
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    with socket.socket(socket.AF_UNIX) as listener, open(log, "ab") as output:
        listener.bind(path)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "fedbio.nursery", str(listener.fileno()), "fedbio.client", *libraries],
            env={**os.environ, **dict.fromkeys(names, str(threads))},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            # Ctrl-C is for who has started it, who ends the scripts in good order
            start_new_session=True,
        )
    try:
        yield path
    finally:
        process.send_signal(KILL_ALL)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.unlink(path)  # noqa: PTH108 - as above
        os.rmdir(folder)  # noqa: PTH106


def nursery_command(nursery: str, script: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line of who stands for a script that runs in a nursery.

    Parameters
    ----------
    nursery : str
        Path of its socket.
    script : str
    arguments : sequence of str
        Of the script.
    """
    return [sys.executable, "-I", "-S", __file__, nursery, script, *arguments]


def _stand_for(nursery: str, script: Sequence[str]) -> int:
    """Have a script run in the nursery and return its exit code, negative for a signal."""
    folder = os.getcwd()  # noqa: PTH109 - as below
    request = json.dumps({"script": script, "folder": folder, "environment": dict(os.environ)}).encode()
    answer = _REFUSED
    with socket.socket(socket.AF_UNIX) as connection:
        # one that comes before the script is there waits until it is
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, lambda number, frame: connection.send(_TERMINATE))
        with contextlib.suppress(OSError):
            connection.connect(nursery)
            socket.send_fds(connection, [len(request).to_bytes(_SIZE_BYTES, "big")], [1, 2])
            connection.sendall(request)
            # from here on it may run: who hears no more of it may not run it again
            answer = b""
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            answer = connection.recv(64)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if answer == _REFUSED:
        _run_here(script)
    return int(answer) if answer else -signal.SIGKILL


def _run_here(script: Sequence[str]) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *script])  # noqa: S606 - the site allows this script


class _Nursery:
    """Takes scripts in, one fork for each, and sees them end."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._running: dict[int, socket.socket] = {}
        self._environment = _told_to_libraries(dict(os.environ))
        self._wake, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def run(self) -> Sequence[str]:
        """Serve for ever; return in each child, with the script that it shall run and its arguments."""
        while True:
            poll = select.poll()
            for each in (self._listener, *self._running.values()):
                poll.register(each, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            ready = {number for number, _ in poll.poll()}
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
            for child, connection in list(self._running.items()):
                if connection.fileno() in ready:
                    self._hear(child, connection)
            self._see_ends()
            if self._listener.fileno() in ready and (script := self._take_in()):
                return script

    def _take_in(self) -> Sequence[str]:
        """Fork for who has connected; return its script in the child, and nothing here."""
        connection, _ = self._listener.accept()
        outputs: list[int] = []
        try:
            connection.settimeout(ASK_S)
            begin, outputs, _, _ = socket.recv_fds(connection, _SIZE_BYTES, 2)
            content = bytearray()
            while len(content) < int.from_bytes(begin, "big"):
                if not (more := connection.recv(1 << 16)):
                    raise ConnectionResetError
                content += more
            request = json.loads(content)
            if _told_to_libraries(request["environment"]) != self._environment or len(outputs) != 2:
                connection.sendall(_REFUSED)
                connection.close()
                return ()
            child = os.fork()
            if not child:
                self._become(request["folder"], request["environment"], outputs)
                return tuple(request["script"])
            self._running[child] = connection
        except (OSError, ValueError, KeyError):
            connection.close()
        finally:
            for each in outputs:
                with contextlib.suppress(OSError):
                    os.close(each)
        return ()

    def _become(self, folder: str, environment: dict[str, str], outputs: Sequence[int]) -> None:
        """Have this child stand where a new process of its own would."""
        from fedbio.processes import die_with_parent

        os.setsid()
        die_with_parent()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, KILL_ALL):
            signal.signal(number, signal.SIG_DFL)
        for each in (self._listener, *self._running.values()):
            each.close()
        for here, output in enumerate(outputs, 1):
            os.dup2(output, here)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)

    def _hear(self, child: int, connection: socket.socket) -> None:
        try:
            said = connection.recv(64)
        except OSError:
            said = b""
        if said:
            _signal_group(child, signal.SIGTERM)
        else:
            _kill_tree(child)

    def _see_ends(self) -> None:
        while True:
            try:
                ended, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not ended:
                return
            connection = self._running.pop(ended, None)
            if connection is not None:
                _signal_group(ended, signal.SIGKILL)
                with connection, contextlib.suppress(OSError):
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            # what a script leaves behind has become a child of this process
            for orphan in _children() - set(self._running):
                _kill_tree(orphan)


def _told_to_libraries(environment: dict[str, str]) -> dict[str, str]:
    """Return what libraries read while they are imported; how Python writes makes no difference."""
    ignored = ("PYTHONUNBUFFERED",)
    return {
        name: value for name, value in environment.items() if name.startswith(_READ_ON_IMPORT) and name not in ignored
    }


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _kill_tree(root: int, *, itself: bool = True) -> None:
    from fedbio.processes import descendants

    for each in (*((root,) if itself else ()), *descendants(root)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _end_all() -> NoReturn:
    _kill_tree(os.getpid(), itself=False)
    os._exit(0)


def _children() -> set[int]:
    from fedbio.processes import children

    return children(os.getpid())


def _run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script as if an interpreter had just been started for it."""
    if "numpy" in sys.modules:
        # each process has entropy of its own
        sys.modules["numpy"].random.seed()
    sys.argv[:] = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # noqa: PTH100, PTH120 - pathlib would take as long to import as all the rest
    sys.stdout.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    module = types.ModuleType("__main__")
    module.__file__ = script
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    try:
        with open(script, "rb") as file:
            code = compile(file.read(), script, "exec")
        exec(code, module.__dict__)  # noqa: S102 - the site allows this script
    except SystemExit:
        raise
    except BaseException as error:
        # without the lines of this file
        of_script = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(of_script), of_script)
        sys.exit(1)


def _serve(number: int, modules: Sequence[str]) -> None:
    from fedbio.processes import adopt_orphans, die_with_parent

    signal.signal(KILL_ALL, lambda number, frame: _end_all())
    die_with_parent(KILL_ALL)
    adopt_orphans()
    for each in modules:
        # a script that needs it says so itself
        with contextlib.suppress(ImportError):
            importlib.import_module(each)
    nursery = _Nursery(socket.socket(fileno=number))
    script, *arguments = nursery.run()
    _run_script(script, arguments)


def _main() -> None:
    if sys.argv[1].isdecimal():
        return _serve(int(sys.argv[1]), sys.argv[2:])
    code = _stand_for(sys.argv[1], sys.argv[2:])
    if code < 0:
        # ends as the script did, so that whoever waits sees the signal
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    _main()
