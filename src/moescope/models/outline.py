"""A model as its configuration says, without weights: for what asks for shapes alone."""

from os import PathLike
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from moescope.errors import ModelError
from moescope.models.checkpoint import CONFIG, Checkpoint, first_line, locate
from moescope.models.discover import moe_layers
from moescope.models.load import auto_class
from moescope.models.ported import deepseek
from moescope.models.view import MoEModel


def outline(name: str | PathLike[str], *, revision: str | None = None) -> MoEModel:
    """Layers, experts and widths of a model from its `config.json`; nothing can run.

    Args:
        name: Name of a reference model, folder, or Hub id, of which small files alone are fetched.
        revision: Branch, tag, or commit, for a Hub id.

    Raises:
        ModelError: The model cannot be found, is dense, or is of a family that moescope does not
            know, or that has to run to be known.
    """
    deepseek.register()
    checkpoint = locate(name, revision=revision)
    if not (checkpoint.folder / CONFIG).is_file():
        raise ModelError(
            f"{checkpoint.name} holds no {CONFIG}",
            expected="a run folder with a capture, or the folder of a model",
        )
    model = skeleton(checkpoint)
    try:
        layers = moe_layers(model)
    except NotImplementedError as error:
        raise ModelError(
            f"layers of {type(model).__name__} have to run to be known", got=first_line(error)
        ) from error
    return MoEModel(
        model=model,
        tokenizer=None,
        layers=layers,
        name=checkpoint.name,
        revision=checkpoint.revision,
    )


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The modules of a model, on the device "meta".

    Args:
        checkpoint: Where its configuration lies.
        dtype: Of the weights, where the configuration does not say.

    Raises:
        ModelError: The configuration cannot be read, or is none of a model.
    """
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(checkpoint, False).from_config(
                config, dtype=config.dtype or dtype
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot read the configuration of {checkpoint.name}", got=first_line(error)
        ) from error
    model.train(mode=False)
    return model
