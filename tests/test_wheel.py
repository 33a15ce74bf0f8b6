"""The wheel, away from the repository: built, installed in a fresh environment, run from another folder."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "qapbench"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source.parent), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    (built,) = source.parent.glob("*.whl")
    return built


def test_nothing_generic_lands_in_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"qapbench", f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info"}
    for needed in (
        "py.typed",
        "tasks/diagramqa/test.parquet",
        "specs/quickstart.yaml",
        "strategies/pruners/cdpruner.py",
    ):
        assert f"qapbench/{needed}" in names
    assert wheel.stat().st_size < 40_000_000


def test_the_quickstart_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """The dependencies come from this environment by path; its own qapbench does not, because a `.pth` inside a
    folder that a `.pth` names is not read."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*install, wheel], check=True, timeout=120)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    where = [python, "-c", "import qapbench; print(qapbench.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=120)
    assert str(packages) in found.stdout, found.stderr
    command = [environment / "bin" / "qapbench", "run", "quickstart", "--set", "task.limit=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "leaderboard.html").exists()
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 6
