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
            raise EvaluationError(
                f"no shipped model {model!r}; {nearest(model, ['testbed-lm', 'testbed-vlm'])}"
            ) from error
        if not (folder / "config.json").is_file():
            raise EvaluationError(f"the shipped model {model!r} holds no config.json at {folder}: install it again")
        return str(folder)
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise EvaluationError(f"the model folder {path} holds no config.json; give a folder of save_pretrained")
        return str(path)
    if not HUB_ID.match(model):
        raise EvaluationError(
            f"no model {model!r}: give a folder, a hub id such as Qwen/Qwen2.5-7B, testbed-lm or testbed-vlm"
        )
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


def load_vision_model(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A vision-language model in evaluation mode on its device, and its processor.

    Raises:
        EvaluationError: the weights are not here and can't be fetched, or the model takes no images.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    torch_device = resolve_device(device)
    source = resolve_model(model)
    _require_reachable(source)
    try:
        config = AutoConfig.from_pretrained(source)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise EvaluationError(
                f"the model {model!r} ({config.model_type}) takes no images, and the recipe has tasks with images"
            )
        processor = AutoProcessor.from_pretrained(source)
        weights = dtype if dtype == "auto" else getattr(torch, dtype)
        loaded = AutoModelForImageTextToText.from_pretrained(source, dtype=weights)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(_unloadable(model, error)) from error
    return loaded.to(torch_device).eval(), processor


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


def processed_prompt(model: str, prompt: str, images: list[Path]) -> tuple[dict[str, Any], Any]:
    """What the model's processor makes of a prompt, and its tokenizer.

    Images whose place the prompt does not mark are put before it by the model's chat template, where it has one.

    Raises:
        EvaluationError: the processor or an image cannot be loaded, or the two do not go together.
    """
    from transformers import AutoProcessor

    source = resolve_model(model)
    _require_reachable(source)
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise EvaluationError(_unloadable(model, error)) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if not images:
        return dict(tokenizer(prompt, return_tensors="pt")), tokenizer
    if tokenizer is processor:
        raise EvaluationError(f"the model {model!r} comes with a tokenizer only: it takes no image")
    image_token = getattr(processor, "image_token", None)
    if getattr(processor, "chat_template", None) and not (image_token and str(image_token) in prompt):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    opened = [_opened(path) for path in images]
    try:
        inputs = processor(text=[prompt], images=opened, return_tensors="pt")
    except (ValueError, TypeError) as error:
        raise EvaluationError(
            f"the processor of {model!r} refuses this prompt: {_first_sentence(str(error))}"
        ) from error
    return dict(inputs), tokenizer


def _opened(path: Path) -> Any:
    try:
        from PIL import Image

        with Image.open(path) as image:
            return image.convert("RGB")
    except ImportError as error:
        raise EvaluationError("reading an image needs Pillow: pip install pillow") from error
    except OSError as error:
        raise EvaluationError(f"no image can be read from {path}: {_first_sentence(str(error))}") from error


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
