"""Cut source texts into documents, four domains, training and held out.

    python recipes/tiny/documents.py --sources DIR --work DIR

`--sources` holds `wikitext103_test.csv`, `gsm8k_test.txt`, `gsm8k_train_questions.txt` and
`debian_handbook_fr.txt`; code comes from the standard library of the Python that runs this.
Training documents go to `WORK/train/`, held-out ones into the package as its built-in corpus, so
that nothing the package measures was seen in training.
"""

import argparse
import json
import random
import re
import sysconfig
from pathlib import Path

SEED = 0
LONGEST_HELD_OUT_CHARACTERS = 5_000
CODE_CHARACTERS = 2_500_000
BUILTIN = Path(__file__).parents[2] / "src/moescope/corpora/builtin"

FRENCH = frozenset(
    "le la les des une est et dans pour que qui sur avec par ce cette sont du".split()
)
ENGLISH = frozenset("the of and to is in that for with this are be on it by as can from".split())
NOT_CODE = frozenset(
    "test tests site-packages idlelib lib2to3 turtledemo encodings pydoc_data ensurepip".split()
)

Documents = list[tuple[str, str]]  # (identifier, text)


def encyclopedia(sources: Path) -> tuple[Documents, Documents]:
    """WikiText-103 test split by article; the 32 shortest articles are held out."""
    text = (sources / "wikitext103_test.csv").read_text(encoding="utf-8")
    text = text.strip('"\n ').replace('""', '"')
    pieces = re.split(r"(?m)^ = ([^=].*?[^=]) = \s*$", "\n " + text)
    articles = [
        (plain(title), plain(title) + "\n\n" + plain(body))
        for title, body in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    articles.sort(key=lambda article: len(article[1]))
    return articles[32:], articles[:32]


def plain(text: str) -> str:
    """Undo WikiText's tokenisation: ` @-@ `, spaced punctuation, spaced quotes."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r" ([,.;:!?)\]])", r"\1", text)
    text = re.sub(r"([(\[£$]) ", r"\1", text)
    text = re.sub(r" '(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    lines = (line.strip() for line in text.strip().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def maths(sources: Path) -> tuple[Documents, Documents]:
    """GSM8K: train questions and two thirds of the test problems train; the rest is held out."""
    questions = re.split(
        r"(?<=\?)(?=[A-Z])", (sources / "gsm8k_train_questions.txt").read_text(encoding="utf-8")
    )
    solved = []
    for line in (sources / "gsm8k_test.txt").read_text(encoding="utf-8").splitlines():
        text = re.sub(r"(?<=[?])(?=\S)|(?<=[.\d])(?=[A-Z][a-z])", "\n", line.strip())
        solved.append(re.sub(r"\s*####\s*", "\n#### ", text))
    random.Random(SEED).shuffle(solved)
    cut = len(solved) // 3
    train = [(f"question {i}", q) for i, q in enumerate(questions)]
    train += [(f"problem {i}", p) for i, p in enumerate(solved) if i >= cut]
    return train, [(f"problem {i}", p) for i, p in enumerate(solved) if i < cut]


def code(sources: Path) -> tuple[Documents, Documents]:
    """Modules of Python's standard library; 36 of middling size are held out."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if NOT_CODE.isdisjoint(relative.parts) and "config-" not in str(relative):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 2_000 <= len(text) <= 60_000:
                modules.append((str(relative), text))
    random.Random(SEED).shuffle(modules)
    train, size = [], 0
    for name, text in modules[36:]:
        size += len(text)
        if size > CODE_CHARACTERS:
            break
        train.append((name, text))
    return train, modules[:36]


def french(sources: Path) -> tuple[Documents, Documents]:
    """Sections of the Debian handbook, French lines only; 36 of middling size are held out."""
    sections = []
    text = (sources / "debian_handbook_fr.txt").read_text(encoding="utf-8")
    for number, section in enumerate(text.split("\n\n")):
        kept = "\n".join(line for line in section.splitlines() if is_french(line))
        if len(kept) >= 300:
            sections.append((f"section {number}", kept))
    random.Random(SEED).shuffle(sections)
    held_out = [s for s in sections if 800 <= len(s[1]) <= 8_000][:36]
    return [s for s in sections if s not in held_out], held_out


def is_french(line: str) -> bool:
    words = re.findall(r"\w+", line.lower())
    return sum(w in FRENCH for w in words) > sum(w in ENGLISH for w in words)


def shortened(text: str) -> str:
    """At most `LONGEST_HELD_OUT_CHARACTERS`, cut at the end of a line where there is one."""
    if len(text) <= LONGEST_HELD_OUT_CHARACTERS:
        return text
    head = text[:LONGEST_HELD_OUT_CHARACTERS]
    return head[: head.rfind("\n")] if "\n" in head else head


def write(path: Path, documents: Documents) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"id": i, "text": t}, ensure_ascii=False) for i, t in documents)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def read(path: Path) -> Documents:
    """The inverse of `write`."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [(row["id"], row["text"]) for row in map(json.loads, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    for cut in (encyclopedia, maths, code, french):
        train, held_out = cut(options.sources)
        held_out = [(name, shortened(text)) for name, text in held_out]
        write(options.work / "train" / f"{cut.__name__}.jsonl", train)
        write(BUILTIN / f"{cut.__name__}.jsonl", held_out)
        for name, documents in (("train", train), ("held out", held_out)):
            characters = sum(len(text) for _, text in documents)
            print(f"{cut.__name__} {name}: {len(documents)} documents, {characters} characters")


if __name__ == "__main__":
    main()
