"""Tasks of the lm-evaluation-harness, on the model in memory."""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd

from moescope.errors import MoEScopeError, OptionError
from moescope.evaluate.predictions import evaluating
from moescope.models.view import MoEModel

_RESAMPLES = 1_000  # for standard errors that have no formula


def tasks(
    model: MoEModel,
    names: Sequence[str | os.PathLike[str]],
    *,
    include_path: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Run tasks of the lm-evaluation-harness on the model as it is now.

    Called within an intervention, it measures the changed model. Tasks of the harness need their
    data, from the Hub unless they are in the cache; a task of one's own with `dataset_path: json`
    and local `data_files` (absolute, or from the working directory) needs no network.

    Args:
        model: The model, with a tokenizer; it is put into evaluation mode meanwhile.
        names: Tasks or groups of the harness, tasks found in `include_path`, or YAML files.
        include_path: Folder with YAML files of further tasks.
        num_fewshot: Solved examples in each prompt; None as the task says, which is mostly 0.
        limit: Questions per task; None asks all.
        batch_size: Requests per forward pass.
        seed: Seed of the choice of solved examples.

    Returns:
        One row per task, metric and filter of the answers: task, metric, filter, value,
        standard_error (over questions, as the harness gives it; NaN where it gives none), n,
        num_fewshot, version (as the task's file says), seed.

    Raises:
        MoEScopeError: The harness is not installed.
        OptionError: There is no such task, or the model has no tokenizer.
    """
    try:
        from lm_eval.evaluator import evaluate
    except ImportError as error:
        raise MoEScopeError(
            "tasks need the lm-evaluation-harness, which is not installed",
            got=error,
            remedy="pip install 'moescope[tasks]'",
        ) from error
    loaded = _load(names, include_path)
    for task in loaded["tasks"].values():
        if num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    with evaluating(model):
        results = evaluate(
            lm=_harness_model(model, batch_size),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
        )
    return _table(results, seed)


def _load(
    names: Sequence[str | os.PathLike[str]], include_path: str | os.PathLike[str] | None
) -> Any:
    """The tasks with their data."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else Path(include_path)
    specs = [os.fspath(name) for name in names]

    def not_in(known: Mapping[str, object]) -> list[str]:
        return [spec for spec in specs if spec not in known and not Path(spec).is_file()]

    manager = TaskManager(include_path=folder, include_defaults=False)
    if not_in(manager.task_index):
        manager = TaskManager(include_path=folder)  # reads its own 15,000: half a minute
    for name in not_in(manager.task_index):
        near = get_close_matches(name, manager.all_tasks, n=1)
        raise OptionError(
            f"unknown task {name!r}",
            expected="a task of the harness, one in `include_path`, or a YAML file",
            remedy=f"Did you mean {near[0]!r}?" if near else None,
        )
    return manager.load(specs)


def _harness_model(model: MoEModel, batch_size: int) -> Any:
    """What the harness asks."""
    from lm_eval.models.huggingface import HFLM

    if model.tokenizer is None:
        raise OptionError(
            f"tasks are text, and the model {model.name!r} came without a tokenizer",
            remedy="Load the model with `tokenizer=...`",
        )
    logger = logging.getLogger(HFLM.__module__)
    before, logger.disabled = logger.disabled, True  # it warns of models in memory
    try:
        return HFLM(
            pretrained=model.model,
            backend="seq2seq" if model.model.config.is_encoder_decoder else "causal",
            tokenizer=copy.deepcopy(model.tokenizer),  # may gain a padding token
            batch_size=batch_size,
        )
    finally:
        logger.disabled = before


def _table(results: Any, seed: int) -> pd.DataFrame:
    rows = []
    for task, measured in results["results"].items():
        for key, value in measured.items():
            metric, _, answers = key.partition(",")
            if not answers or metric.endswith("_stderr"):
                continue
            error = measured.get(f"{metric}_stderr,{answers}")
            row = {
                "task": task,
                "metric": metric,
                "filter": answers,
                "value": float(value),
                "standard_error": float("nan") if isinstance(error, str | None) else float(error),
                "n": measured["sample_len"],
                "num_fewshot": results["n-shot"].get(task),
                "version": str(results["versions"].get(task)),
                "seed": seed,
            }
            rows.append(row)
    return pd.DataFrame(rows)
