"""The model of a recipe: found, loaded, put on its device; every way that this can fail is one clear line."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from attn_eval.errors import EvaluationError, nearest

TESTBED_PREFIX = "testbed-"
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def resolve_model(model: str) -> str:
    """The folder or hub id to load from: ``testbed-lm`` stands for the shipped model.

    Raises:
        EvaluationError: no such folder, and the name can't be a hub id either.
    """
    if model.startswith(TESTBED_PREFIX) and not Path(model).exists():
        import attn_hooks

        try:
            folder = attn_hooks.testbed_path(model)
        except attn_hooks.AttnHooksError as error:
            raise EvaluationError(f"no shipped model {model!r}; {nearest(model, ['testbed-lm'])}") from error
        if not (folder / "config.json").is_file():
            raise EvaluationError(f"the shipped model {model!r} holds no config.json at {folder}: install it again")
        return str(folder)
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise EvaluationError(f"the model folder {path} holds no config.json; give a folder of save_pretrained")
        return str(path)
    if not HUB_ID.match(model):
        raise EvaluationError(f"no model {model!r}: give a folder, a hub id such as Qwen/Qwen2.5-7B, or testbed-lm")
    return model


def resolve_device(device: str) -> str:
    """``cuda`` or ``cpu`` for ``auto``; a GPU that is asked for and not there is an error."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise EvaluationError("device is 'cuda' but PyTorch sees no GPU here: use device=cpu, or device=auto")
    return "cuda" if available and device != "cpu" else "cpu"


def load_model(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The model in evaluation mode on its device, and its tokenizer.

    Raises:
        EvaluationError: the weights are not here and can't be fetched, or are of a kind that is no causal model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch_device = resolve_device(device)
    source = resolve_model(model)
    _require_reachable(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError, ImportError) as error:
        raise EvaluationError(_unloadable(model, error)) from error
    return loaded.to(torch_device).eval(), tokenizer


def model_skeleton(model: str) -> Any:
    """The model with its modules and no trained weights, from its config alone: enough to say what can be edited.

    The weights' memory is reserved but never touched, so that a large model needs no memory of that size.

    Raises:
        EvaluationError: the config is not here and can't be fetched.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    source = resolve_model(model)
    _require_reachable(source)
    try:
        config = AutoConfig.from_pretrained(source)
        causal = type(config) in AutoModelForCausalLM._model_mapping
        auto_class = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        with torch.device("meta"):
            skeleton = auto_class.from_config(config, dtype=torch.bfloat16)
    except (OSError, ValueError, ImportError) as error:
        raise EvaluationError(_unloadable(model, error)) from error
    return skeleton.to_empty(device="cpu").eval()


def _require_reachable(source: str) -> None:
    """Without a network the hub's client tries for a minute before it gives up: look the hub's name up first."""
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).exists():
        return
    try:
        cached = try_to_load_from_cache(source, "config.json")
    except ValueError as error:
        raise EvaluationError(f"{source!r} is no folder, and no model id of the hub either: {error}") from error
    if isinstance(cached, str):
        return
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        # Behind a proxy the name is looked up there, not here.
        if not getproxies():
            socket.getaddrinfo(host, None)
    except OSError as error:
        raise EvaluationError(_unloadable(source, OSError(f"{host} can't be reached ({error})."))) from error


def _unloadable(model: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, OSError) and not Path(resolve_model(model)).exists():
        return (
            f"the model {model!r} is neither a folder nor in the local Hugging Face cache, and the hub gave none: "
            f"{_first_sentence(reason)} Download it where there is a network, or use --set model=FOLDER"
        )
    return f"the model {model!r} can't be loaded: {_first_sentence(reason)}"


def _first_sentence(text: str) -> str:
    sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return sentence if len(sentence) <= 200 else sentence[:197] + "..."
