"""The wheel holds the configs: a system loads in an empty folder without the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_system_loads_from_a_wheel_in_an_empty_folder(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "boltznce" / "py.typed").exists()
    code = (
        f"import boltznce as bz; assert bz.__file__.startswith({str(site)!r}); system = bz.load_system('aldp');"
        "print(system.n_atoms, system.reference() is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "22 True", done.stderr
