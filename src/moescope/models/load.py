"""Loads a mixture-of-experts model and makes sure that it is understood."""

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from moescope.errors import ConformanceError, ModelError, OptionError
from moescope.models.checkpoint import Checkpoint, first_line, locate, weights
from moescope.models.conformance import require_conformance
from moescope.models.discover import dense_layers, moe_layers
from moescope.models.offload import all_parameters, is_offloaded
from moescope.models.ported import deepseek
from moescope.models.quantised import is_quantised
from moescope.models.view import MoEModel

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def load(
    model: str | PathLike[str] | PreTrainedModel,
    *,
    tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    dense_as_experts: bool = False,
) -> MoEModel:
    """Load a mixture-of-experts model in evaluation mode, and prove that its parts add up.

    Args:
        model: Name of a reference model ("tiny", "tiny-switch"), folder, Hub id, or a model in
            memory. Only a Hub id is looked up on the network. Weights are read from safetensors
            files only.
        tokenizer: The same for the tokenizer; by default what lies beside the weights, if any.
        revision: Branch, tag, or commit, for a Hub id.
        dtype: "auto" (as saved), or the dtype to load in.
        device_map: Passed to `from_pretrained`; a part that goes to the CPU beside a GPU, or to
            "disk", is read layer by layer whenever it is needed (docs/big-models.md).
        offload_folder: Where parts that go to disk are kept as long as the model lives, if their
            form in the checkpoint is not that in memory (as with most experts); by default where
            temporary files go.
        trust_remote_code: Whether Python files that come with the model may run.
        dense_as_experts: Whether this is a dense model, to be seen as one expert per layer that
            every token goes to, so that its feed-forward layers can be aligned.

    Raises:
        ModelError: The model cannot be found or read, is dense, has NaN or infinite weights, or
            is of a family that moescope does not know.
        ConformanceError: Its blocks cannot be rebuilt from their parts (see `conformance`).
        OptionError: Options that do not fit.
    """
    if isinstance(model, PreTrainedModel):
        if revision is not None or device_map is not None or dtype != "auto" or trust_remote_code:
            raise OptionError(
                "revision, dtype, device_map and trust_remote_code are for models that are read "
                "from a checkpoint",
                got=f"a {type(model).__name__} in memory",
            )
        checkpoint, ready = None, model
    else:
        deepseek.register()
        checkpoint = locate(model, revision=revision, code=trust_remote_code)
        if offload_folder is not None and device_map is None:
            raise OptionError(
                "nothing is offloaded without a device_map",
                got=f"offload_folder {offload_folder}",
                expected='a device_map such as "auto" or {"": "disk"} too',
            )
        options = {"device_map": device_map, "trust_remote_code": trust_remote_code}
        ready = _read_and_offload(checkpoint, _checked(dtype), offload_folder, **options)
    ready.train(False)
    seen = MoEModel(
        model=ready,
        tokenizer=_tokenizer(tokenizer, checkpoint, trust_remote_code=trust_remote_code),
        layers=(dense_layers if dense_as_experts else moe_layers)(ready),
        name="in memory" if checkpoint is None else checkpoint.name,
        revision=None if checkpoint is None else checkpoint.revision,
    )
    _require_finite(ready)
    with _named_where_offload_fails(seen):
        require_conformance(seen)
    return seen


@contextmanager
def _named_where_offload_fails(model: MoEModel) -> Iterator[None]:
    """A few classes of transformers do not run, or compute something else, with weights on disk."""
    if not is_offloaded(model.model):
        yield
        return
    try:
        yield
    except (ConformanceError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{type(model.model).__name__} does not run as it should with offloaded weights",
            got=first_line(error),
            remedy="Choose a device_map that keeps all weights on devices",
        ) from error


def _checked(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, str) and dtype not in ("auto", *_DTYPES):
        raise OptionError("unknown dtype", got=dtype, expected=", ".join(("auto", *_DTYPES)))
    return dtype


def _read_and_offload(
    checkpoint: Checkpoint,
    dtype: str | torch.dtype,
    folder: str | PathLike[str] | None,
    **options: Any,
) -> PreTrainedModel:
    """Read a model; the folder with its weights on disk goes away when the model does."""
    with ExitStack() as stack:
        if options["device_map"] is not None:
            room = TemporaryDirectory(prefix="moescope-offload-", dir=folder)
            options["offload_folder"] = stack.enter_context(room)
        model = _read_model(checkpoint, dtype, **options)
        weakref.finalize(model, stack.pop_all().close)
    return model


def _read_model(
    checkpoint: Checkpoint, dtype: str | torch.dtype, **options: Any
) -> PreTrainedModel:
    weights(checkpoint)
    try:
        with bars_on_terminals_only():
            loaded: Any = auto_class(checkpoint, options["trust_remote_code"]).from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise ModelError(f"cannot read {checkpoint.name}", got=first_line(error)) from error
    model: PreTrainedModel = loaded[0]
    report = loaded[1]
    if report["missing_keys"]:
        # transformers fills the gaps with random numbers and goes on.
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{checkpoint.name} lacks weights that its class {type(model).__name__} needs",
            got=f"{len(missing)} missing, such as {', '.join(missing[:3])}",
        )
    return model


def auto_class(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """What reads the model whole: encoder and decoder, or what it has besides text if need be."""
    config = AutoConfig.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    of_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    sees_too = not of_text and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return AutoModelForMultimodalLM if sees_too else AutoModelForCausalLM


def _tokenizer(
    asked_for: str | PathLike[str] | PreTrainedTokenizerBase | None,
    beside: Checkpoint | None,
    *,
    trust_remote_code: bool,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was asked for, or the one beside the weights, or none."""
    if isinstance(asked_for, PreTrainedTokenizerBase):
        return asked_for
    if asked_for is not None:
        beside = locate(asked_for, code=trust_remote_code)
        if not beside.has_tokenizer:
            raise ModelError(f"there is no tokenizer in {beside.name}")
    if beside is None or not beside.has_tokenizer:
        return None
    return _read_tokenizer(beside, trust_remote_code=trust_remote_code)


def _read_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(
            f"cannot read the tokenizer of {checkpoint.name}",
            got=first_line(error),
            remedy="Pass another one as `tokenizer`",
        ) from error
    return tokenizer


def _require_finite(model: PreTrainedModel) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        ModelError: Names the parameter.
    """
    for name, parameter in all_parameters(model):
        if parameter.is_meta:
            raise ModelError(f"the weights {name} were never loaded")
        if is_quantised(parameter) or parameter.numel() == 0:
            continue
        # The extremes carry NaN and infinity along, and take no memory to find.
        low, high = parameter.aminmax()
        if not (low.isfinite() and high.isfinite()):
            broken = parameter.numel() - int(parameter.isfinite().sum())
            raise ModelError(
                f"the weights {name} are not all finite",
                got=f"{broken} of {parameter.numel()} values are NaN or infinite",
                remedy="The checkpoint is damaged, or was trained until it diverged",
            )


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keep the progress bars of transformers out of log files."""
    bars: Any = logging
    silence = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            bars.enable_progress_bar()
