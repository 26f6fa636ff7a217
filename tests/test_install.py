"""`make` on a machine that is not ours: what it asks for, whom it refuses, and when it builds .venv anew."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

FILES = {name: (ROOT / name).read_text() for name in ("Makefile", "requirements-cpu.txt", "requirements.txt")}
VERSION = "%d.%d" % sys.version_info[:2]


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but what an installation reads."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def make(folder, *arguments, python=sys.executable):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env["PATH"] = f"{folder / 'bin'}:{env['PATH']}"
    return subprocess.run(["make", f"PYTHON={python}", *arguments], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=60)


def program(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def test_makefile_and_requirements_name_the_same_versions():
    named = re.findall(r"torch==([\w.+]+)", FILES["Makefile"] + FILES["requirements-cpu.txt"])
    assert len(named) == 3 and set(named) == {"2.13.0+cpu"}
    for package in ("torch", "transformers", "vllm"):
        (exact,) = re.findall(rf"^{package}(?:-cpu)?==([\w.+]+)", FILES["requirements-cpu.txt"], re.MULTILINE)
        (least,) = re.findall(rf"^{package}>=([\d.]+),", FILES["requirements.txt"], re.MULTILINE)
        assert exact.split(".")[:2] == least.split("."), package


def test_the_command_by_hand_is_the_one_of_make(folder):
    recipe = make(folder, "-n", ".venv/ready").stdout
    by_hand = re.findall(r"^#   pip install (.*)$", FILES["requirements-cpu.txt"], re.MULTILINE)
    by_make = re.findall(r"^\S+ -m pip install --quiet (.*)$", recipe, re.MULTILINE)
    assert len(by_hand) == 2 and by_make[:2] == by_hand


@pytest.mark.parametrize("system, version", [("Darwin arm64", "3.11"), ("MINGW64_NT-10.0 x86_64", "3.11"),
                                             ("Linux armv7l", "3.11"), ("Linux x86_64", "3.10"),
                                             ("Linux x86_64", "3.1"), ("Linux aarch64", "3.15"), ("Linux x86_64", "")])
@pytest.mark.parametrize("goal", ["demo", "test"])
def test_another_machine_is_refused_at_once_by_the_readmes_line(folder, goal, system, version):
    program(folder / "bin" / "uname", f"echo '{system}'")
    python = program(folder / "python", f"echo {version}" if version else "exit 1")
    done = make(folder, goal, python=python)
    (line,) = re.findall(r"^This needs (.*)\.$", done.stderr, re.MULTILINE)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"need {line}, git, make" in readme
    assert done.returncode != 0 and done.stdout == "" and not (folder / ".venv").exists()


@pytest.mark.parametrize("system", ["Linux x86_64", "Linux aarch64"])
@pytest.mark.parametrize("version", ["3.11", "3.14"])
def test_the_machines_of_the_readme_are_taken(folder, system, version):
    program(folder / "bin" / "uname", f"echo '{system}'")
    python = program(folder / "python", f'[ "$1" = -c ] && echo {version} || exec touch "$0.called"')
    done = make(folder, ".venv/ready", python=python)
    assert "This needs" not in done.stderr and (folder / "python.called").exists()


@pytest.mark.parametrize("ready", [None, "", "3.1\n", "2.7\n"], ids=["broke off", "no version", "prefix", "other"])
def test_a_venv_that_broke_off_or_has_another_python_is_built_anew(folder, ready):
    (folder / ".venv").mkdir()
    if ready is not None:
        (folder / ".venv" / "ready").write_text(ready)
    assert "-m venv --clear .venv\n" in make(folder, "-n", ".venv/ready").stdout


def test_a_venv_that_is_ready_is_kept_and_follows_the_requirements(folder):
    (folder / ".venv").mkdir()
    ready = folder / ".venv" / "ready"
    ready.write_text(f"{VERSION}\n")
    assert "pip" not in make(folder, "-n", ".venv/ready").stdout
    os.utime(ready, (0, 0))
    done = make(folder, "-n", ".venv/ready").stdout
    assert "pip" in done and "--clear" not in done
