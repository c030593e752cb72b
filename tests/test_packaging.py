"""The wheel: both packages, the profiles inside, and nothing that claims a name which is not ours."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from this checkout."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = builders.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(built)


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_only_our_names_are_installed(unpacked: Path) -> None:
    installed = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert installed == {"klotski_compiler", "klotski_runtime"}


def test_every_module_is_installed(unpacked: Path) -> None:
    for package in (ROOT / "klotski_compiler", ROOT / "runtime" / "klotski_runtime"):
        for source in (*package.rglob("*.py"), *package.rglob("*.[ch]")):
            assert (unpacked / source.relative_to(package.parent)).is_file(), source


def test_the_page_finds_its_template(unpacked: Path) -> None:
    assert (unpacked / "klotski_compiler" / "report.html").is_file()


def test_profiles_are_found_beside_the_installed_package(unpacked: Path, tmp_path: Path) -> None:
    script = (
        "import json; from klotski_compiler.shipped import shipped, shipped_names;"
        "print(json.dumps({str(shipped(kind, name)): kind for kind in ('hardware', 'models', 'routing')"
        " for name in shipped_names(kind)}))"
    )
    # -I: neither this checkout nor an editable install of it may stand in for the wheel.
    bare = f"import sys; sys.path.insert(0, {str(unpacked)!r}); {script}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", bare], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = {
        unpacked / "klotski_compiler" / p.relative_to(ROOT): p.parent.name for p in ROOT.glob("profiles/*/*.json")
    }
    assert found == {str(path): kind for path, kind in expected.items()}


def test_every_command_has_its_module(unpacked: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"klotski-compile", "klotski-inspect", "klotski-profile", "klotski-run"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        source = (unpacked / module.replace(".", "/")).with_suffix(".py")
        assert f"def {function}(" in source.read_text()
