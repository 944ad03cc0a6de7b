"""Fixtures every folder may use. Nothing here needs a network."""

import os
import shutil

import pytest
import torch

import terminal

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which a test of anything may do; on a GPU kernels are compiled.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """Under xdist the workers share the cores; results must not depend on how many there are."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo():
    """The demonstration model and its tokenizer, shared: whoever attaches to it also detaches."""
    from regard.models import pretrained

    try:
        pretrained.demo_folder()
    except pretrained.RegardError as error:
        pytest.skip(str(error))
    return pretrained.load("demo")


@pytest.fixture(scope="session")
def tiny_folder(demo, tmp_path_factory):
    """A folder with a two-layer model for the command line: all of it runs in seconds, none of it is any good."""
    return terminal.tiny_model(tmp_path_factory.mktemp("models") / "tiny", demo[1])


@pytest.fixture
def regard_command(monkeypatch, capfd):
    """Runs `regard WORDS...` inside this process; returns its exit status and what it printed."""
    return terminal.runner(monkeypatch, capfd)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium to drive; skips without one, unless REGARD_REQUIRE_CHROMIUM says that there must be one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("REGARD_REQUIRE_CHROMIUM"):
        pytest.fail("REGARD_REQUIRE_CHROMIUM is set, and no chromium is on the path")
    pytest.skip("no chromium on the path (make test installs it where it may)")
