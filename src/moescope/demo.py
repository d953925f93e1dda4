"""The main job on the shipped model: study, report."""

import os
import shutil
from pathlib import Path

from moescope.errors import OptionError
from moescope.models.load import load
from moescope.reports.write import report
from moescope.runs import Run
from moescope.scheduler import study

MODEL = "tiny"
CONFIG = {
    "capture": {"tokens": 4_096, "tokens_per_expert": 4_000},
    "analyses": {
        "routing": {},
        "lens": {
            "prompt": "Natalia sold 48 clips in April, and then she sold half as many clips in",
            "tokens": 0,
        },
        "align": {
            "source": 1,
            "target": 2,
            "source_experts": (0, 2, 4, 6),
            "target_experts": (0, 2, 4, 6),
        },
    },
}


def demo(out: str | os.PathLike[str] = "moescope-demo") -> Path:
    """Study the shipped model on the built-in corpus anew and write the report.

    Args:
        out: Run folder. An earlier run in it is removed first.

    Returns:
        The report.

    Raises:
        OptionError: The folder holds something that is no run.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        if not Run(folder).capture_folder.is_dir():
            raise OptionError(
                f"{folder} is not empty and holds no run",
                remedy="Choose another folder with --out",
            )
        shutil.rmtree(folder)
    return report(study(load(MODEL), folder, CONFIG))
