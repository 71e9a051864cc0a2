"""The test suite under other versions of its dependencies: `make matrix`, or `nox -s NAME`."""

import os

import nox

# The same choice as the Makefile's: CI has no GPU, and takes PyTorch's CPU build.
TORCH = os.environ.get("TORCH", "torch==2.13.0")
TRITON = os.environ.get("TRITON", "triton==3.6.0")

# `oldest` is left out: torch 2.8 comes with several gigabytes of CUDA libraries.
nox.options.sessions = ["transformers", "triton"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True


def run_tests(session: nox.Session, *versions: str, tests: tuple[str, ...] = ()) -> None:
    """Install the package with exactly these versions and run the tests."""
    session.install(*TORCH.split())
    session.install("-e", ".[test]", *versions)
    session.run("python", "-m", "pip", "check")
    session.run(
        "python",
        *("-m", "pytest", "-n", "2", "--dist", "loadfile", *tests, *session.posargs),
        env={"OMP_NUM_THREADS": "1"},
    )


@nox.session
@nox.parametrize("version", ["4.57.6", "5.24.0"])
def transformers(session: nox.Session, version: str) -> None:
    """The last 4.x, whose modules and signatures differ from 5.x, and the newest."""
    run_tests(session, TRITON, f"transformers=={version}")


@nox.session
@nox.parametrize("version", ["3.4.0", "3.9.0"])
def triton(session: nox.Session, version: str) -> None:
    """The oldest and the newest triton: the kernels, interpreted and compiled."""
    run_tests(
        session,
        f"triton=={version}",
        tests=("-k", "(kernel or triton or compile) and not packaging and not cuda"),
    )


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest supported version of everything that matters."""
    session.install("torch==2.8.0", "triton==3.4.0")
    run_tests(session, "torch==2.8.0", "triton==3.4.0", "transformers==4.56.0")
