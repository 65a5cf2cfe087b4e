"""The console command: it lists the commands, starts each by the code that its script starts, and names what to do."""

import contextlib
import importlib
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import boltznce
from boltznce import __main__ as console
from boltznce import cli
from boltznce.command_line import command_line
from boltznce.commands import COMMANDS, module_of
from boltznce.config import config_dir
from boltznce.methods.models import load_models
from boltznce.run import train
from boltznce.signals import Stopped

ROOT = Path(__file__).parents[1]
each = pytest.mark.parametrize("name", COMMANDS)


def started(monkeypatch, *words, by="/usr/bin/boltznce"):
    monkeypatch.setattr("sys.argv", [by, *words])


def test_each_command_has_its_module_script_and_config():
    folders = {"boltznce/commands": "py", "scripts": "py", "configs": "yaml"}
    for folder, ending in folders.items():
        found = {path.stem for path in (ROOT / folder).glob(f"*.{ending}")} - {"__init__"}
        names = {module_of(name).rpartition(".")[2] for name in COMMANDS} if folder == "boltznce/commands" else COMMANDS
        assert found == set(names), folder
    assert config_dir() == ROOT / "configs"


@each
def test_the_command_and_its_script_are_the_same(name, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "launch", lambda *given: calls.append((*given, sys.argv[1:])))
    started(monkeypatch, name, "seed=1")
    console.main()
    script = ROOT / "scripts" / f"{name}.py"
    started(monkeypatch, "seed=1", by=str(script))
    runpy.run_path(str(script), run_name="__main__")
    main = importlib.import_module(module_of(name)).main
    assert calls == [(name, main, ["seed=1"])] * 2


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job", "system=gaussians8"]], ids=" ".join)
def test_hydra_says_the_same_of_both(words, monkeypatch, capsys):
    said = []
    for by, first in (("boltznce", ["train"]), (str(ROOT / "scripts" / "train.py"), [])):
        started(monkeypatch, *first, *words, by=by)
        with contextlib.suppress(SystemExit):
            console.main() if first else runpy.run_path(by, run_name="__main__")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "budget: cpu" in said[0]


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_the_commands_are_listed(words, monkeypatch, capsys):
    started(monkeypatch, *words)
    console.main()
    text = capsys.readouterr().out
    assert text.isascii()
    for name, what in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, what] for line in text.splitlines())


def test_they_are_listed_at_once():
    code = (
        "import sys; from boltznce.__main__ import main; main();"
        "print({'torch', 'hydra', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


@pytest.mark.parametrize("word", ["tain", "system=aldp", "--hlep", ""])
def test_an_unknown_command_is_told(word, monkeypatch, capsys):
    started(monkeypatch, word, "seed=1")
    with pytest.raises(SystemExit) as ended:
        console.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"Error: Unknown command {word!r}: choose one of {', '.join(COMMANDS)}."


def test_the_version(monkeypatch, capsys):
    started(monkeypatch, "--version")
    console.main()
    assert capsys.readouterr().out == f"{boltznce.__version__}\n"
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("/usr/bin/boltznce", "boltznce train"),
        (r"C:\Python\Scripts\boltznce.exe", "boltznce train"),
        ("/site/boltznce/__main__.py", "python -m boltznce train"),
        ("scripts/sample.py", "python scripts/train.py"),
        ("train.py", "boltznce train"),  # somebody's own
        ("/site/ipykernel_launcher.py", "boltznce train"),
        ("-c", "boltznce train"),
        ("", "boltznce train"),
    ],
)
def test_what_to_do_is_told_in_the_words_that_started_it(by, words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    started(monkeypatch, by=by)
    assert command_line("train") == words
    assert command_line("train", "resume=a b") == f"{words} 'resume=a b'"
    monkeypatch.chdir(tmp_path)
    started(monkeypatch, by=str(ROOT / "scripts" / "sample.py"))
    assert command_line("train") == f"python {ROOT}/scripts/train.py"


def test_a_stopped_run_and_one_that_is_not_finished_say_how_to_go_on(tiny_run, tmp_path, monkeypatch):
    def stop(folder):
        raise Stopped(15)

    run = boltznce.load_run(tiny_run)
    monkeypatch.setattr("boltznce.run._train", stop)
    for by, start in (("boltznce", "boltznce train"), ("scripts/train.py", "python scripts/train.py")):
        monkeypatch.chdir(ROOT)
        started(monkeypatch, by=by)
        with pytest.raises(Stopped) as stopped:
            train(run.folder)
        assert stopped.value.how_to_go_on == f"{start} resume={tiny_run}"
        with pytest.raises(boltznce.UserError, match=f"finish it with {start} resume={tmp_path}"):
            load_models(tmp_path, run.config, run.system, "cpu")
