"""The wheel holds all that is needed: in an empty folder, without the repository, a system loads and a run is made."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from forks import BOLTZNCE

import boltznce

ROOT = Path(__file__).parents[1]
CONSOLE = (
    "import importlib.metadata as all; (command,) = all.entry_points(group='console_scripts', name='boltznce');"
    "command.load()()"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(site, folder, *words):
    """What it prints in a folder, with the unpacked wheel and without a compiler."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_whole(site):
    (about,) = site.glob("*.dist-info")
    assert about.name == f"boltznce-{boltznce.__version__}.dist-info"
    assert (about / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (site / "boltznce" / "py.typed").exists()
    models = [path for path in (ROOT / "boltznce" / "pretrained").rglob("*") if path.suffix not in ("", ".pyc")]
    assert all((site / path.relative_to(ROOT)).is_file() for path in models)


def test_a_system_loads_in_an_empty_folder(site, tmp_path):
    code = (
        f"import boltznce as bz; assert bz.__file__.startswith({str(site)!r}); system = bz.load_system('aldp');"
        "print(system.n_atoms, system.reference() is not None)"
    )
    assert python(site, tmp_path, "-c", code) == "22 True"


def test_the_console_command_trains_and_samples_in_an_empty_folder(site, tmp_path):
    told = python(site, tmp_path, "-c", CONSOLE, "train", *BOLTZNCE, "hydra.run.dir=run")
    assert "ΔF" in told
    assert (tmp_path / "run" / "train.log").exists()
    told = python(site, tmp_path, "-m", "boltznce", "sample", "run=run", "n_samples=50", "output=drawn")
    assert told.startswith("50 samples in drawn: ESS")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "data", "drawn"}
