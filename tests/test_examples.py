import runpy
from pathlib import Path

import pytest

from moescope.config import build, read_yaml
from moescope.runs import Run
from moescope.scheduler import StudyConfig

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_example_study_fits():
    config = build(StudyConfig, read_yaml(EXAMPLES / "study.yaml"), "study.yaml")
    assert set(config.analyses) == {"routing", "align"}


@pytest.mark.slow
def test_first_steps_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["first_steps.py", str(tmp_path / "run")])
    runpy.run_path(str(EXAMPLES / "first_steps.py"), run_name="__main__")
    assert "report.html" in capsys.readouterr().out
    assert Run(tmp_path / "run").results() == ["align", "routing"]
