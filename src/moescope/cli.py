"""The command line: parse, call, print. Analyses appear by registration."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import subcommand_cli_from_dict

from moescope import evaluate
from moescope.analyses.material import Material
from moescope.analyses.registry import Analysis, all_analyses
from moescope.captures.options import CaptureOptions
from moescope.captures.read import Capture
from moescope.captures.record import capture
from moescope.comparison import compare
from moescope.config import build, read_yaml
from moescope.corpora.packing import Packing
from moescope.demo import demo
from moescope.errors import MoEScopeError, OptionError
from moescope.models.inspection import inspect
from moescope.models.load import load
from moescope.models.outline import outline
from moescope.reports.write import report
from moescope.reproduction import reproduce
from moescope.runs import Result, to_json
from moescope.scheduler import StudyConfig, open_corpus, plan, study
from moescope.surgery.conversion import SplitOptions, UpcycleOptions, split, upcycle
from moescope.surgery.conversion_result import Conversion, require_absent

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print JSON for scripts.")]
CorpusArguments = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        name="corpus",
        metavar="DOMAIN=SOURCE",
        help="Text by domain, such as `wiki=a.txt:paragraphs maths=b.csv:question`; the built-in "
        "corpus if left out.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a checkpoint is read."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    dtype: Annotated[str, tyro.conf.arg(name="model-dtype")] = "auto"
    """auto (as saved), bfloat16, float16, float32 or float64."""
    device_map: str | None = None
    """Where the weights go, such as `cuda` or `auto`; the processor if left out."""
    trust_remote_code: bool = False
    """Run Python files that come with the model."""
    dense_as_experts: bool = False
    """See a dense model as one expert per layer."""


Loading = OmitArgPrefixes[ModelOptions]


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """How a checkpoint that is to be converted is read."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    dtype: Annotated[str, tyro.conf.arg(name="model-dtype")] = "auto"
    """auto (as saved), bfloat16, float16, float32 or float64."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        subcommand_cli_from_dict(
            commands(),
            prog="moescope",
            description="What the experts of a mixture-of-experts language model do, and which of "
            "them do the same thing.",
            args=_joined(sys.argv[1:] if arguments is None else arguments),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except MoEScopeError as error:
        print(f"moescope: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moescope: interrupted; the same command continues from here", file=sys.stderr)
        return 130
    return 0


def commands() -> dict[str, Callable[..., None]]:
    """Every subcommand by name: the fixed ones and one per registered analysis."""
    fixed: dict[str, Callable[..., None]] = {
        "demo": demo_command,
        "inspect": inspect_command,
        "study": study_command,
        "reproduce": reproduce_command,
        "capture": capture_command,
        "evaluate": evaluate_command,
        "upcycle": upcycle_command,
        "split": split_command,
        "compare": compare_command,
        "report": report_command,
    }
    return fixed | {name: _command_of(entry) for name, entry in all_analyses().items()}


def _joined(arguments: Sequence[str]) -> list[str]:
    """`swap blocks RUN` is `swap-blocks RUN`, and so for any command of two words."""
    name = "-".join(arguments[:2])
    return [name, *arguments[2:]] if name in commands() else list(arguments)


def demo_command(out: Path = Path("moescope-demo"), as_json: Json = False) -> None:
    """Study the shipped model on the shipped text and write a report. Starts anew every time.

    Args:
        out: Run folder; an earlier demo in it is replaced.
    """
    _show_report(demo(out), as_json)


def inspect_command(
    model: Positional[str],
    loading: Loading = ModelOptions(),
    as_json: Json = False,
) -> None:
    """Load a model and show its layers, and that every block can be rebuilt from its parts.

    Args:
        model: Hub id, local folder, or the name of a shipped model.
    """
    opened = load(model, **vars(loading))
    table = inspect(opened)
    if as_json:
        print(to_json({"model": opened.name, "layers": table.to_dict("records")}))
    else:
        print(opened, table.to_string(index=False, float_format="%.2g"), sep="\n\n")


def study_command(
    model: Positional[str],
    out: Path,
    config: Path | None = None,
    corpus: CorpusArguments = (),
    loading: Loading = ModelOptions(),
    dry_run: bool = False,
    as_json: Json = False,
) -> None:
    """Capture once what the chosen analyses need, run them, resume what is missing, report.

    Args:
        model: Hub id, local folder, or the name of a shipped model.
        out: Run folder.
        config: YAML file with any of `corpus`, `packing`, `capture` and `analyses`.
        dry_run: Only print the plan with estimated time, disk and memory.
    """
    settings = build(StudyConfig, read_yaml(config) if config else {}, str(config))
    if corpus:
        settings = replace(settings, corpus=_sources(corpus))
    opened = load(model, **vars(loading))
    if dry_run:
        planned = plan(opened, out, settings)
        print(to_json(planned.as_dict()) if as_json else planned)
    else:
        _show_report(report(study(opened, out, settings)), as_json)


def reproduce_command(
    file: Positional[Path],
    out: Path,
    model: str | None = None,
    corpus: CorpusArguments = (),
    device_map: str | None = None,
    as_json: Json = False,
) -> None:
    """Run a published study and the same done right, beside the published values; resumes.

    Args:
        file: YAML file of a published table, such as reproduce/moe_align_table1.yaml.
        out: Run folder; the study done right goes into its folder `corrected`.
        model: Another model in the place of the published one; nothing is comparable then.
        device_map: Where the weights go, such as `cuda` or `auto`; the processor if left out.
    """
    run = reproduce(file, out, model=model, corpus=_sources(corpus) or None, device_map=device_map)
    _show_report(report(run), as_json)


def capture_command(
    model: Positional[str],
    out: Path,
    corpus: CorpusArguments = (),
    packing: Packing = Packing(),  # noqa: B008
    options: OmitArgPrefixes[CaptureOptions] = CaptureOptions(),  # noqa: B008
    loading: Loading = ModelOptions(),
    as_json: Json = False,
) -> None:
    """Record one forward pass over a corpus: routing of every token, wide tensors of a sample.

    Args:
        model: Hub id, local folder, or the name of a shipped model.
        out: Run folder.
    """
    opened = load(model, **vars(loading))
    recorded = capture(opened, open_corpus(_sources(corpus), packing), out, **vars(options))
    print(to_json(recorded.manifest) if as_json else recorded)


def evaluate_command(
    model: Positional[str],
    corpus: CorpusArguments = (),
    packing: Packing = Packing(),  # noqa: B008
    loading: Loading = ModelOptions(),
    as_json: Json = False,
) -> None:
    """Loss and perplexity of a model by domain, with intervals over documents.

    Args:
        model: Hub id, local folder, or the name of a shipped model.
    """
    opened = load(model, **vars(loading))
    table = evaluate.loss(opened, open_corpus(_sources(corpus), packing))
    if as_json:
        print(to_json({"model": opened.name, "losses": table.to_dict("records")}))
    else:
        print(opened.name, table.to_string(index=False, float_format="%.4g"), sep="\n\n")


def upcycle_command(
    dense: Positional[str],
    out: Path,
    options: OmitArgPrefixes[UpcycleOptions] = UpcycleOptions(),  # noqa: B008
    reading: OmitArgPrefixes[DenseOptions] = DenseOptions(),
    as_json: Json = False,
) -> None:
    """Turn a dense model into a mixture of experts that are copies of its feed-forward layers.

    Args:
        dense: Hub id or local folder of a Llama, Mistral, Qwen2 or Qwen3 model.
        out: Folder for the new model; it must not exist.
    """
    require_absent(out)
    _show_conversion(upcycle(dense, options, **vars(reading)), out, as_json)


def split_command(
    dense: Positional[str],
    out: Path,
    options: OmitArgPrefixes[SplitOptions] = SplitOptions(),  # noqa: B008
    reading: OmitArgPrefixes[DenseOptions] = DenseOptions(),
    as_json: Json = False,
) -> None:
    """Turn a dense model into a mixture of experts that share out its feed-forward neurons.

    Args:
        dense: Hub id or local folder of a Llama, Mistral, Qwen2 or Qwen3 model.
        out: Folder for the new model; it must not exist.
    """
    require_absent(out)
    _show_conversion(split(dense, options, **vars(reading)), out, as_json)


def compare_command(runs: Positional[tuple[Path, ...]], out: Path, as_json: Json = False) -> None:
    """Put the measures of several runs side by side: checkpoints, sizes, relatives.

    Args:
        runs: Run folders with results, the one to hold the others against first.
        out: Run folder for the comparison and its report.
    """
    _show_report(report(compare(runs, out)), as_json)


def report_command(run: Positional[Path], as_json: Json = False) -> None:
    """Write the report of a run: one HTML file, figures and tables.

    Args:
        run: Run folder with results.
    """
    _show_report(report(run), as_json)


def _command_of(entry: Analysis[Any]) -> Callable[..., None]:
    def command(run: Positional[Path], options: Any, as_json: Json = False) -> None:
        _show(entry.run(Material(run), options), as_json)

    def planned(
        run: Positional[Path], options: Any, dry_run: bool = False, as_json: Json = False
    ) -> None:
        if dry_run and entry.plan is not None:
            model = Material(run).model if Capture.exists(run) else outline(str(run))
            found = entry.plan(model, options)
            print(to_json(found.as_dict()) if as_json else found)
        else:
            command(run, options, as_json)

    chosen = command if entry.plan is None else planned
    chosen.__annotations__["options"] = Annotated[entry.options, tyro.conf.OmitArgPrefixes]
    chosen.__doc__ = (
        f"{entry.question}\n\n"
        "Args:\n    run: Run folder; with a capture, unless a checkpoint is named."
    )
    if entry.plan is not None:
        chosen.__doc__ += (
            "\n    dry_run: Only print what it would do and how long that would take; a model may "
            "be named in the place of the run."
        )
    return chosen


def _sources(corpus: Sequence[str]) -> dict[str, str]:
    pairs = [argument.partition("=") for argument in corpus]
    for domain, equals, source in pairs:
        if not (domain and equals and source):
            raise OptionError(
                "cannot read --corpus", got=domain + equals + source, expected="DOMAIN=SOURCE"
            )
    return {domain: source for domain, _, source in pairs}


def _show(result: Result, as_json: bool) -> None:
    print(to_json(result.as_dict()) if as_json else result)


def _show_conversion(conversion: Conversion, out: Path, as_json: bool) -> None:
    conversion.save(out)
    print(to_json(conversion.as_dict()) if as_json else f"{conversion}\nModel: {out}")


def _show_report(path: Path, as_json: bool) -> None:
    print(to_json({"report": path}) if as_json else f"Report: {path}")


if __name__ == "__main__":
    sys.exit(main())
