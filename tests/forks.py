"""Scripts started by the fork of a process that has imported everything: a start costs milliseconds, not seconds.

``with Forks() as forks: child = forks.start("train", "system=double_well", ...); child.kill(); child.wait()``
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Forks:
    """The process that forks. Children are ended with it."""

    def __enter__(self) -> "Forks":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
        self._children = []
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.status is None:
                child.kill()
                child.wait()
        self._server.stdin.close()
        self._server.wait()

    def start(self, script: str, *arguments: object, cwd: Path, limit: int | None = None) -> "Child":
        """Run ``scripts/<script>.py`` in ``cwd``; no file may grow beyond ``limit`` bytes, as on a full disk."""
        log = cwd / f"log_{len(self._children)}_{script}.txt"
        command = [script, [str(word) for word in arguments], str(cwd), str(log), limit]
        child = Child(self, self.ask("start", *command), log)
        self._children.append(child)
        return child

    def run(self, script: str, *arguments: object, **options: object) -> "Child":
        """Start a script and wait for its end."""
        child = self.start(script, *arguments, **options)
        child.wait()
        return child

    def ask(self, *message: object) -> int | None:
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


class Child:
    """A running script, with its log."""

    def __init__(self, forks: Forks, pid: int, log: Path):
        self.forks, self.pid, self._log, self.status = forks, pid, log, None

    def poll(self) -> int | None:
        """The exit status, negative for the signal that ended it; None while it runs."""
        if self.status is None:
            self.status = self.forks.ask("poll", self.pid)
        return self.status

    def wait(self, timeout: float = 600.0) -> int:
        """The exit status."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"{self.output[-2000:]}\nstill runs"
            time.sleep(0.02)
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def told(self) -> list[str]:
        """What the script says of a mistake or of its stop; empty where there is a trace."""
        return [] if "Traceback" in self.output else [line for line in self.output.splitlines() if line[:5] in BEGINS]


BEGINS = ("Error", "Stopp")
TABG = [  # seconds
    *("system=double_well", "method=tabg", "budget=smoke", "threads=1", "device=cpu"),
    *("hot.fit.steps=40", "hot.fit.checkpoint_every=10", "+hot.fit.log_every=1", "hot.batch_size=64"),
    *(
        "annealing.n_steps=1",
        "annealing.fit.steps=20",
        "annealing.fit.checkpoint_every=5",
        "+annealing.fit.log_every=1",
    ),
    *("annealing.n_draws=500", "annealing.n_buffer=500", "annealing.draw_batch_size=100"),
    "evaluation={n_samples: 200, n_ladder: 100, n_reference: 200, n_bootstrap: 20, n_torus: 50}",
]
BOLTZNCE = [
    *("system=gaussians8", "method=boltznce", "budget=smoke", "threads=1", "device=cpu", "data_dir=data"),
    *("data.n_samples=2000", "flow.n_train=1000", "flow.n_validation=100", "flow.batch_size=64", "flow.fit.steps=40"),
    *("flow.fit.checkpoint_every=10", "flow.fit.validate_every=20", "+flow.fit.log_every=1", "flow.solver.steps=6"),
    *("samples.n_train=256", "samples.n_validation=64", "samples.batch_size=64"),
    *("ebm.fit.checkpoint_every=5", "ebm.batch_size=64", "ebm.fit.steps=20", "ebm.fit.validate_every=10"),
    *("+ebm.fit.log_every=1", "evaluation.n_samples=256", "evaluation.batch_size=64", "evaluation.n_bootstrap=20"),
    *("evaluation.n_torus=50", "evaluation.n_exact=32", "evaluation.n_correction=32"),
]
SHORT = [
    *(
        "duration=2",
        "n_repeats=1",
        "+settings.equilibration=1",
        "+settings.segment_length=1",
        "data_dir=data",
        "name=x",
    ),
]
SIMULATION = ["system=aldp", "sampling=umbrella", "+settings.n_windows=4", *SHORT]
METADYNAMICS = [
    *("system=double_well", "sampling=metadynamics", "+settings.n_walkers=16", "+settings.bias_duration=2"),
    *("+settings.compile=false", *SHORT),
]


def leftovers(folder: Path) -> list[str]:
    """Names of unfinished work: temporary and partial files and folders, and locks."""
    parts = (".tmp", ".old", ".partial", ".lock", ".unfinished")
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(parts)]


def _serve() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    for name in ("train", "sample", "free_energy", "simulate", "import", "finetune", "benchmark"):
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="imported")
    import boltznce.methods.boltznce
    import boltznce.methods.tabg  # noqa: F401

    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "start":
            pid = os.fork() or _be(*rest)
            print(pid, flush=True)
        else:
            pid, status = os.waitpid(rest[0], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)


def _be(script: str, arguments: list[str], cwd: str, log: str, limit: int | None) -> None:
    """Become the script; does not return."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(cwd)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(out, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = [str(ROOT / "scripts" / f"{script}.py"), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
