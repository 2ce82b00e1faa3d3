"""Measurements of a model by one forward: which hidden dimensions carry its sinks, which heads look at an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_eval.errors import EvaluationError

# A few sentences with the tokens that sinks are known at: the first, full stops, line breaks.
DEFAULT_PROMPT = (
    "Summer is warm. Winter is cold.\nParis is the capital of France, and Rome is the capital of Italy; both lie on a river.\n"
    "Question: what colour is a ripe lemon?\nAnswer: yellow."
)


def prompted_model(
    model: str, prompt: str, images: list[Path], dtype: str, device: str
) -> tuple[Any, dict[str, Any], Any]:
    """The model on its device, what its processor makes of the prompt there, and its tokenizer.

    Raises:
        EvaluationError: the model, its processor or an image cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from attn_eval.loading import processed_prompt, resolve_device, resolve_model

    inputs, tokenizer = processed_prompt(model, prompt, images)
    source, torch_device = resolve_model(model), resolve_device(device)
    try:
        is_causal = type(AutoConfig.from_pretrained(source)) in AutoModelForCausalLM._model_mapping
        auto_class = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
        loaded = auto_class.from_pretrained(source, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise EvaluationError(f"the model {model!r} can't be loaded: {error}") from error
    on_device = {
        name: value.to(torch_device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    return loaded.to(torch_device).eval(), on_device, tokenizer


def measured_sinks(
    model: str, prompt: str | None, images: list[Path], tau: float, dtype: str, device: str
) -> dict[str, Any]:
    """What ``attn-hooks find-sinks`` prints as JSON: the dimensions for VAR, and each that was found with its token."""
    from attn_hooks.sinks import find_sink_dims

    loaded, inputs, tokenizer = prompted_model(model, prompt or DEFAULT_PROMPT, images, dtype, device)
    measured = find_sink_dims(loaded, tau, **inputs)
    return {
        "model": model,
        "class": measured.model,
        "hidden_size": measured.hidden_size,
        "layers": list(measured.layers),
        "tau": tau,
        "tokens": measured.tokens,
        "dims": list(measured.dims),
        "strongest": measured.strongest,
        "found": [
            {
                "dim": about.dim,
                "tells_sinks": measured.tells_sinks(about),
                "layers": list(about.layers),
                "share_of_tokens": about.share,
                "strongest": about.strongest,
                "layer": about.layer,
                "position": about.position,
                "token": tokenizer.decode([about.token_id]),
            }
            for about in measured.found
        ],
    }


def scored_heads(model: str, prompt: str, images: list[Path], dtype: str, device: str) -> dict[str, Any]:
    """What ``attn-hooks score-heads`` writes as JSON: each measure by layer and head, and the heads ranked by each."""
    from attn_hooks.head_scores import MEASURES, score_heads

    loaded, inputs, _ = prompted_model(model, prompt, images, dtype, device)
    scores = score_heads(loaded, **inputs)
    return {
        "model": model,
        "class": scores.model,
        "prompt": prompt,
        "images": [str(path) for path in images],
        "tokens": scores.tokens,
        "image_tokens": scores.image_tokens,
        "layers": list(scores.layers),
        "measures": {
            name: {
                "meaning": meaning,
                "by_layer": [
                    [None if score != score else score for score in row] for row in scores.by_measure[name].tolist()
                ],
                "ranked": [
                    {"layer": layer, "head": head, "score": score} for layer, head, score in scores.ranked(name)
                ],
            }
            for name, meaning in MEASURES.items()
            if name in scores.by_measure
        },
        "missing": scores.missing,
    }


def draw_head_scores(measured: dict[str, Any], path: Path) -> None:
    """A heat map for each measure, heads across and layers down, side by side.

    Raises:
        EvaluationError: matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("heat maps need matplotlib: pip install 'attn-hooks[eval]'") from error
    measures = measured["measures"]
    rows, columns = len(measured["layers"]), len(next(iter(measures.values()))["by_layer"][0])
    figure = Figure(figsize=(len(measures) * (1.8 + 0.18 * columns), 1.6 + 0.18 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, about) in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True):
        table = [[float("nan") if score is None else score for score in row] for row in about["by_layer"]]
        drawn = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0.0)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        step = 1 + rows // 20
        axes.set_yticks(range(0, rows, step), measured["layers"][::step])
        axes.set_title(name.replace("_", " "), fontsize=10)
        figure.colorbar(drawn, ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
