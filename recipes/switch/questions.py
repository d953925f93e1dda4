"""BANKING77 as questions and answers: the label's name in small letters, spaces for underscores.

    python recipes/switch/questions.py --sources DIR

`--sources` holds `banking77/train.csv` and `banking77/test.csv` (columns `text`, `category`).
Writes the test split into the package, where `Questions` finds it; nothing is trained or chosen
on it.
"""

import argparse
from pathlib import Path

import pandas as pd

SEED = 0
DEV_QUESTIONS = 1_000
PACKAGED = Path(__file__).parents[2] / "src/moescope/corpora/builtin_questions/banking77.csv"


def read(path: Path) -> pd.DataFrame:
    """Columns `question` and `answer`, rows in the order of the file."""
    rows = pd.read_csv(path, keep_default_na=False)
    answers = rows.category.str.lower().str.replace("_", " ")
    return pd.DataFrame({"question": rows.text.str.strip(), "answer": answers})


def training(sources: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training split in two: what is trained on, and what is chosen on."""
    rows = read(sources / "banking77" / "train.csv")
    dev = rows.sample(DEV_QUESTIONS, random_state=SEED)
    return rows.drop(dev.index), dev


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    rows = read(parser.parse_args().sources / "banking77" / "test.csv")
    rows.to_csv(PACKAGED, index=False, lineterminator="\n")
    print(f"{len(rows)} questions, {rows.answer.nunique()} answers")


if __name__ == "__main__":
    main()
