"""A capture of a model that does not fit the memory it may take."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "capture_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_model():
    """336 MB of weights on disk, at most 150 MB of anonymous memory above that of the libraries."""
    options = ["--mebibytes", "300", "--limit", "150", "--above-start"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "336 MB" in done.stdout
