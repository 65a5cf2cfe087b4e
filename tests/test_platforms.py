"""What runs on Linux, macOS and Windows alike: text is UTF-8, and nothing is taken for granted that one lacks."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import boltznce
from boltznce import UserError, load_system
from boltznce.systems import openmm_energy, semiempirical, workers

PACKAGE = Path(boltznce.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")])
NOT_EVERYWHERE = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"}
POSIX_ONLY = {"os.fork", "os.sysconf", "os.getuid", "os.sched_getaffinity", "os.statvfs", "signal.SIGKILL"}


def calls_without_encoding(tree):
    """Lines that read or write text in the machine's own code page."""
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in ("open", "read_text", "write_text", "NamedTemporaryFile", "fdopen"):
            continue
        if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in ("Path", "os", "RunFolder"):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        place = 0 if name == "open" and isinstance(node.func, ast.Attribute) else 1
        mode = given.get("mode", node.args[place] if len(node.args) > place else None)
        modes = [part.value for part in ast.walk(mode) if isinstance(part, ast.Constant)] if mode else []
        binary = name in ("open", "fdopen") and any("b" in str(each) for each in modes)
        if not binary and "encoding" not in given:
            yield node.lineno


def guarded(tree):
    """Lines of all that stands in a try, or behind a condition."""
    inside = [node for node in ast.walk(tree) if isinstance(node, ast.Try | ast.If | ast.IfExp)]
    return {child.lineno for node in inside for child in ast.walk(node) if hasattr(child, "lineno")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_line_needs_a_platform(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assert list(calls_without_encoding(tree)) == []
    safe = guarded(tree)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        needed = (NOT_EVERYWHERE | POSIX_ONLY) & set(names)
        assert not needed or node.lineno in safe, f"line {node.lineno}: {needed}"


def test_what_would_be_missed_is_found():
    bad = ast.parse("import fcntl\nopen('a', 'w')\np.read_text()\np.open()\nopen('b', mode='r')\nopen('c', 'rb')")
    assert list(calls_without_encoding(bad)) == [2, 3, 4, 5]
    assert guarded(bad) == set()


WINDOWS = """
import importlib, importlib.abc, os, pkgutil, sys
from pathlib import Path
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for name in {missing}: sys.modules.pop(name, None)
for name in ("fork", "sysconf", "sched_getaffinity", "getuid"): delattr(os, name)
import boltznce
for module in pkgutil.walk_packages(boltznce.__path__, "boltznce."):
    if not module.name.endswith(".worker"): importlib.import_module(module.name)
assert boltznce.systems.workers.available_cores() >= 1
difference = {{"value": 1.0, "std_error": 0.1, "interval": (0.8, 1.2)}}
results = {{"system": "aldp", "state": "0 < \\u03c6 < 2 rad", "free_energy": {{"ebm": difference}}}}
boltznce.analysis.report.write_report(Path(sys.argv[1]), results, {{}})
"""


def test_everything_is_imported_and_writes_utf8_without_what_windows_lacks(tmp_path):
    """In a process whose own code page is ASCII, as that of Windows has no φ."""
    code = WINDOWS.format(missing=sorted({"fcntl", "resource", "pwd", "grp", "termios"}))
    settings = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code, str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, env=settings, text=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "φ" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert not [line for line in run.stderr.splitlines() if "EncodingWarning" in line and "/boltznce/" in line]


def test_without_worker_processes_openmm_goes_on_alone(monkeypatch):
    for module in (workers, openmm_energy, semiempirical):
        monkeypatch.setattr(module, "WORKERS", False)
    system = load_system("aldp", energy_backend="openmm", n_workers=2)
    x = system.positions.repeat(openmm_energy.MIN_IN_WORKERS, 1, 1)
    assert np.ptp(system.energy(x).numpy()) == 0
    assert system._potential.pool.pids == []
    with pytest.raises(UserError, match="Windows"):
        semiempirical.XTBEnergy([1, 1])
    assert torch.is_tensor(x)
