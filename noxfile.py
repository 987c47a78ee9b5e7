"""What a release must pass beside the suite: `make release-check` runs the sessions `dist` and `client`.

The matrix: the client on every Python that it promises, and the suite on the next minor version of Ray as soon as there
is one, so that its bound in `pyproject.toml` is raised for a reason. `nox -l` lists the sessions. A Python that is not
on this machine is reported as skipped; `nox --error-on-missing-interpreters` makes it an error.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["dist", "client"]

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
"""Of `requires-python` and the classifiers; `tests/arch/test_release.py` compares."""
RAY = "2.60"
"""Minor version that every commit is tested with (`constraints/tested.txt`)."""
NEXT_RAY = "2.61"
TESTED = ROOT / "constraints/tested.txt"


@nox.session(python=False)
def dist(session: nox.Session) -> None:
    """The wheel and the source archive, and that their contents and metadata are whole."""
    for old in DIST.glob("ray_moe-*"):
        old.unlink()
    session.run(sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT), silent=True)
    session.run(sys.executable, str(ROOT / "tools/release.py"), "contents", *map(str, DIST.glob("ray_moe-*")))


@nox.session(python=PYTHONS)
def client(session: nox.Session) -> None:
    """The wheel's extra `client`, alone in a fresh environment, talks to a service without Ray and torch."""
    (wheel,) = DIST.glob("ray_moe-*.whl")
    session.install(f"{wheel}[client]")
    service = subprocess.Popen(
        [sys.executable, "-m", "tests.compat.service"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        target = next(iter(service.stdout or ()), "").strip()
        if not target:
            session.error("tests.compat.service did not say where it listens: see above")
        session.chdir(session.create_tmp())  # the checkout must not be what is imported
        session.run("python", "-W", "error", str(ROOT / "tools/release.py"), "client", target, env={"PYTHONPATH": ""})
    finally:
        service.terminate()
        service.wait()


@nox.session(python="3.11")
@nox.parametrize("ray", [RAY, NEXT_RAY])
def suite(session: nox.Session, ray: str) -> None:
    """The tests that start Ray, with this minor version of it and everything else as tested."""
    found = session.run(
        "python", "-m", "pip", "download", "-q", "--no-deps", "-d", session.create_tmp(), f"ray=={ray}.*",
        success_codes=[0, 1], silent=True,
    )  # fmt: skip
    if found and "No matching distribution" in str(found):
        session.skip(f"there is no Ray {ray} yet")
    others = Path(session.create_tmp()) / "constraints.txt"
    lines = TESTED.read_text(encoding="utf-8").splitlines()
    others.write_text("\n".join(line for line in lines if not line.startswith("ray==")), encoding="utf-8")
    session.install("-c", str(others), "-r", str(ROOT / "constraints/cpu.txt"))
    session.install("-c", str(others), "-e", ".[serve,dev]", f"ray=={ray}.*")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *(session.posargs or ["tests/ray"]))
