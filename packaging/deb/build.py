#!/usr/bin/env python3
"""Build the Debian package `edge-llm_<version>_all.deb` with nothing but Python and dpkg-deb.

The same tree gives the same bytes: times come from SOURCE_DATE_EPOCH or the last commit, owners and modes are set
here. The wheels that are carried are fetched once, checked by their hashes, and kept in build/wheels.
"""

import argparse
import email.utils
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
CARRIED = HERE / "carried.txt"
WHEELS = PROJECT / "build" / "wheels"

PRIVATE = Path("usr/lib/edge-llm")
DOC = Path("usr/share/doc/edge-llm")
MAN = Path("usr/share/man/man1")

# From -> to, both files or both folders.
SHIPPED: tuple[tuple[Path, Path], ...] = (
    (PROJECT / "edge_daemon", PRIVATE / "edge_daemon"),
    (PROJECT / "config.yaml", PRIVATE / "edge_daemon/data/config.yaml"),
    (PROJECT / "systemd/edge-llm.service", PRIVATE / "edge_daemon/data/edge-llm.service"),
    (PROJECT / "tools/publish_task.py", PRIVATE / "publish_task.py"),
    (HERE / "edge-llm", Path("usr/bin/edge-llm")),
    (HERE / "edge-llm-publish", Path("usr/bin/edge-llm-publish")),
    (HERE / "edge-llm.rtupdate", Path("usr/share/python3/runtime.d/edge-llm.rtupdate")),
    (HERE / "lintian-overrides", Path("usr/share/lintian/overrides/edge-llm")),
    # Debian 12 has /lib as another name of /usr/lib, Debian 13 wants packages to use the one with /usr.
    (PROJECT / "systemd/edge-llm.service", Path("usr/lib/systemd/system/edge-llm.service")),
    (PROJECT / "config.yaml", Path("etc/edge-llm/config.yaml")),
    (PROJECT / "config.yaml", DOC / "config.yaml"),
    (PROJECT / "README.md", DOC / "README.md"),
    (PROJECT / "CHANGELOG.md", DOC / "CHANGELOG.md"),
    (PROJECT / "docs", DOC / "docs"),
    (PROJECT / "examples", DOC / "examples"),
    (HERE / "copyright", DOC / "copyright"),
)
CONFFILES = ("/etc/edge-llm/config.yaml",)
SCRIPTS = ("postinst", "prerm", "postrm")
MODES = {
    Path("usr/bin/edge-llm"): 0o755,
    Path("usr/bin/edge-llm-publish"): 0o755,
    Path("usr/share/python3/runtime.d/edge-llm.rtupdate"): 0o755,
    Path("etc/edge-llm/config.yaml"): 0o640,  # postinst hands it to the daemon's group
    **{Path("DEBIAN", script): 0o755 for script in SCRIPTS},
}
OTHER_FILES = 0o644
FOLDERS = 0o755
NOT_SHIPPED = ("__pycache__", "*.pyc")


@dataclass(frozen=True)
class Wheel:
    """A Python package to carry: where its file is or will be, and what is in it."""

    path: Path
    sha256: str


class BuildError(Exception):
    """The package cannot be built; the text says why."""


def main() -> int:
    """Build the package and print its path."""
    options = _arguments()
    os.environ["SOURCE_DATE_EPOCH"] = str(_epoch())  # dpkg-deb takes the times in its archives from it
    try:
        fetch(options.wheels)
        with tempfile.TemporaryDirectory() as temporary:
            tree = Path(temporary, "tree")
            lay_out(tree, options.wheels, options.version)
            print(pack(tree, options.output / f"edge-llm_{options.version}_all.deb"))
    except (BuildError, subprocess.CalledProcessError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the Debian package.")
    parser.add_argument("--version", default=project_version(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=PROJECT / "dist", metavar="DIR", help="(default: dist)")
    parser.add_argument("--wheels", type=Path, default=WHEELS, metavar="DIR", help="(default: build/wheels)")
    return parser.parse_args()


def project_version() -> str:
    """The version of the source, as `edge_daemon/__init__.py` has it."""
    source = (PROJECT / "edge_daemon/__init__.py").read_text(encoding="utf-8")
    return source.partition('__version__ = "')[2].partition('"')[0]


def _epoch() -> int:
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    said = subprocess.run(
        ["git", "-C", str(PROJECT), "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False
    )
    return int(said.stdout or (PROJECT / "CHANGELOG.md").stat().st_mtime)


def fetch(wheels: Path) -> None:
    """Have the wheels of carried.txt in the folder `wheels`; nothing is fetched when they are there."""
    if all(_is_genuine(wheel) for wheel in carried(wheels)):
        return
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--only-binary", ":all:", "-r", str(CARRIED), "-d", str(wheels)], check=True)
    if wrong := [wheel.path.name for wheel in carried(wheels) if not _is_genuine(wheel)]:
        raise BuildError(f"{wheels}: missing, or not for any machine: {', '.join(wrong)}")


def carried(wheels: Path) -> list[Wheel]:
    """What carried.txt asks for, as files in the folder `wheels`."""
    return [_wheel(wheels, line) for line in _lines(CARRIED)]


def _wheel(wheels: Path, line: str) -> Wheel:
    requirement, _, sha256 = line.partition(" --hash=sha256:")
    name, _, version = requirement.partition("==")
    return Wheel(path=wheels / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", sha256=sha256)


def _is_genuine(wheel: Wheel) -> bool:
    return wheel.path.exists() and hashlib.sha256(wheel.path.read_bytes()).hexdigest() == wheel.sha256


def lay_out(tree: Path, wheels: Path, version: str) -> None:
    """Make the folder from which the package is packed."""
    for source, target in SHIPPED:
        _copy(source, tree / target)
    for wheel in carried(wheels):
        _unpack(wheel, tree / PRIVATE)
    _compress((HERE / "edge-llm.1").read_bytes(), tree / MAN / "edge-llm.1.gz")
    (tree / MAN / "edge-llm-publish.1.gz").symlink_to("edge-llm.1.gz")
    _compress(_changelog(version).encode(), tree / DOC / "changelog.gz")
    _refuse_foreign(tree)
    _add_control(tree, version)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    else:
        shutil.copyfile(source, target)


def _unpack(wheel: Wheel, target: Path) -> None:
    """All but the list of files, which only pip needs."""
    with zipfile.ZipFile(wheel.path) as archive:
        archive.extractall(target, [name for name in archive.namelist() if not name.endswith(".dist-info/RECORD")])


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _compress(content: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(content, mtime=0))


def _changelog(version: str) -> str:
    """What Debian's tools want to read; what has changed is in the project's own log."""
    maintainer = next(line for line in _lines(HERE / "control") if line.startswith("Maintainer: "))
    date = email.utils.formatdate(int(os.environ["SOURCE_DATE_EPOCH"]))
    return (
        f"edge-llm ({version}) unstable; urgency=medium\n\n  * The changes are in CHANGELOG.md.\n\n"
        f" -- {maintainer.partition(' ')[2]}  {date}\n"
    )


def _refuse_foreign(tree: Path) -> None:
    """The package is for every machine: nothing in it may be made for one.

    Raises:
        BuildError: a file holds machine code.
    """
    compiled = [path for path in _files(tree) if path.suffix in (".so", ".a") or _first_bytes(path) == b"\x7fELF"]
    if compiled:
        raise BuildError(f"made for one kind of machine: {', '.join(str(path.relative_to(tree)) for path in compiled)}")


def _files(tree: Path) -> Iterable[Path]:
    return (path for path in sorted(tree.rglob("*")) if path.is_file() and not path.is_symlink())


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _add_control(tree: Path, version: str) -> None:
    """The folder DEBIAN: who we are, our scripts, what is configuration, the checksums."""
    size_kib = sum(-(-path.stat().st_size // 1024) for path in _files(tree))
    sums = [f"{_md5(path)}  {path.relative_to(tree)}\n" for path in _files(tree) if path.is_relative_to(tree / "usr")]
    control = (HERE / "control").read_text(encoding="utf-8")
    control = control.replace("@VERSION@", version).replace("@INSTALLED_SIZE@", str(size_kib))
    folder = tree / "DEBIAN"
    folder.mkdir()
    (folder / "control").write_text(control, encoding="utf-8")
    (folder / "conffiles").write_text("".join(f"{path}\n" for path in CONFFILES), encoding="utf-8")
    (folder / "md5sums").write_text("".join(sums), encoding="utf-8")
    for script in SCRIPTS:
        _copy(HERE / script, folder / script)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def pack(tree: Path, package: Path) -> Path:
    """Set what a checkout leaves to chance (modes, times), and pack; returns `package`."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(FOLDERS if path.is_dir() else MODES.get(path.relative_to(tree), OTHER_FILES))
        os.utime(path, (_epoch(), _epoch()), follow_symlinks=False)
    package.parent.mkdir(parents=True, exist_ok=True)
    # xz by one thread: the default differs between Debian and Ubuntu, and more threads cut the data differently.
    pack_with = ["dpkg-deb", "--root-owner-group", "-Zxz", "--threads-max=1", "--build", str(tree), str(package)]
    subprocess.run(pack_with, check=True, stdout=subprocess.DEVNULL)
    return package


if __name__ == "__main__":
    sys.exit(main())
