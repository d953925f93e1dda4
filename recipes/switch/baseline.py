"""What `tiny-switch` is measured against: logistic regression on a bag of words.

    python recipes/switch/baseline.py --sources DIR

The penalty is chosen on the questions set apart; the regression is then fitted again on what
`tiny-switch` is fine-tuned on, and scored once on the test split.
"""

import argparse
from pathlib import Path

import numpy as np
import questions
from jaxtyping import Bool
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)  # scikit-learn's C: the inverse of the penalty's weight


def right(sources: Path) -> Bool[np.ndarray, " questions"]:
    """Whether each question of the test split is answered right."""
    asked, dev = questions.training(sources)
    models: list[Pipeline] = []
    for penalty in PENALTIES:
        model = make_pipeline(CountVectorizer(), LogisticRegression(C=penalty, max_iter=1_000))
        models.append(model.fit(asked.question, asked.answer))
    scores = [model.score(dev.question, dev.answer) for model in models]
    print({c: round(score, 4) for c, score in zip(PENALTIES, scores, strict=True)})
    test = questions.read(sources / "banking77" / "test.csv")
    return models[int(np.argmax(scores))].predict(test.question) == test.answer.to_numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    found = right(parser.parse_args().sources)
    print(f"test accuracy {found.mean():.4f} of {len(found)}")


if __name__ == "__main__":
    main()
