"""The command line ``attn-hooks``: which methods there are, what they can do to a model, and what that does.

Every mistake of a user's ends in one line on the standard error output and exit code 2.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attn_eval.errors import EvaluationError
from attn_eval.terminal import out, silence_loading_bars
from attn_eval.training.command import lofit

USER_ERROR = 2
INTERRUPTED = 130
SHOWN_TEXT = 60

app = typer.Typer(
    name="attn-hooks",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Edit the attention of pretrained models and measure what that does.\n\n"
        "[bold]A first run[/bold], on the small model that is shipped, on a CPU:\n\n"
        "  attn-hooks methods\n\n"
        "  attn-hooks info testbed-lm\n\n"
        "  attn-hooks run testbed-lm/demo -o results/demo\n\n"
        "  attn-hooks run testbed-lm/demo -o results/narrow --set edits.streaming.window=128\n\n"
        "  attn-hooks compare results/demo results/narrow"
    ),
)


app.add_typer(lofit)


@app.command()
def methods(
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything about each method, its parameters' JSON schema included.")
    ] = False,
) -> None:
    """List the methods that a recipe's [bold]edits[/bold] (and attn_hooks.wrap) can name, with their parameters."""
    import attn_hooks

    known = attn_hooks.methods()
    if as_json:
        print(json.dumps({name: _describe(method) for name, method in known.items()}, indent=2))
        return
    table = Table(title="methods", show_lines=True)
    for column in ("method", "what it does", "parameters [default]", "source"):
        table.add_column(column)
    for name, method in known.items():
        described = _describe(method)
        parameters = "\n".join(
            f"{parameter} [{json.dumps(about['default']) if 'default' in about else 'required'}]"
            for parameter, about in described["parameters"]["properties"].items()
        )
        table.add_row(name, escape(described["summary"]), escape(parameters), escape(described["source"]))
    out().print(table)
    out().print(
        "In a recipe: [bold]edits: \\[{method: act, beta: 0.4}][/bold]. In Python: attn_hooks.wrap(model, 'act')."
    )


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help="A folder, a model id of the hub, or testbed-lm. No weights are needed.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="Show in place of that what each token of this prompt holds: text, or which image."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image of the prompt; may be given again, in the prompt's order.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Show what can be edited in a model: layers, heads, image tokens, and which methods would be refused and why.

    With [bold]--prompt[/bold] and [bold]--image[/bold]: where the images lie among the prompt's tokens, and on what grids.
    """
    if prompt is not None or image:
        _show_layout(model, prompt or "", image or [], as_json)
        return
    import attn_hooks
    from attn_eval.loading import model_skeleton
    from attn_hooks.reporting import paths_of_machine

    found = attn_hooks.inspect_model(model_skeleton(model))
    refusals = found.refusals()
    layers = [
        {
            "layer": layer.index,
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "sliding_window": layer.sliding_window,
            "softcap": layer.softcap,
            "sinks": layer.sinks,
        }
        for layer in found.layers
    ]
    accepted = [name for name in attn_hooks.methods() if name not in refusals]
    paths, why_these_paths = paths_of_machine()
    if as_json:
        described = {
            "model": model,
            "class": found.model_class,
            "num_layers": found.num_layers,
            "image_token_id": found.image_token_id,
            "layers": layers,
            "accepted": accepted,
            "refused": refusals,
            "left_alone": found.left_alone,
            "paths": paths,
            "why_these_paths": why_these_paths,
        }
        print(json.dumps(described, indent=2))
        return
    console = out()
    image_tokens = "none" if found.image_token_id is None else f"token id {found.image_token_id}"
    console.print(
        f"[bold]{escape(model)}[/bold]: {found.model_class}, {found.num_layers} layers, {len(found.layers)} of them can "
        f"be edited; image tokens: {image_tokens}"
    )
    console.print(_layer_table(layers))
    for reason, count in Counter(found.left_alone.values()).items():
        console.print(f"left alone: {count} attention module{'s' if count > 1 else ''} ({escape(reason)})")
    console.print(f"methods that fit: {', '.join(accepted) or 'none'}")
    for name, reason in refusals.items():
        console.print(f"refused: [bold]{name}[/bold]: {escape(reason)}")
    console.print(f"paths on this machine: {', '.join(paths)} ({escape(why_these_paths)})")


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped recipe such as testbed-lm/streaming.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where the results go; results/NAME of the recipe by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of the recipe; may be given again. Dotted, tasks by their label and edits by their "
            "method: --set batch_size=4 --set tasks.passkey.samples=50 --set edits.act.beta=0.2",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many samples of each task (of each cell of a grid), for a quick look."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in a folder that holds another run.")
    ] = False,
    save_data: Annotated[
        bool, typer.Option("--save-data", help="Also write each task's questions to data/TASK.jsonl.")
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="The folder of another run on this model and data: its answers without edits are taken over."
        ),
    ] = None,
) -> None:
    """Run a recipe: the same questions to the model as it is and to the edited one, with paired statistics.

    Writes results.json (metrics, every sample, versions, seeds, edits, timing), table.md, a heat map for each needle
    grid and, for each benchmark with images, a plot and the answers. A run that was stopped goes on with the same command.
    """
    import attn_hooks
    from attn_eval.recipe import find_recipe, load_recipe
    from attn_eval.report import console_table
    from attn_eval.run_log import forget_run

    loaded = load_recipe(find_recipe(recipe, attn_hooks.recipes_dir()), overrides or [])
    folder = output or Path("results") / loaded.name
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"the output {folder} is a file: give a folder with -o")
    if overwrite:
        forget_run(folder)

    from attn_eval.runner import run_recipe

    silence_loading_bars()
    results = run_recipe(
        loaded, folder, limit=limit, save_data=save_data, baseline=baseline, console=Console(stderr=True)
    )
    console = out()
    console.print(console_table(results["metrics"], loaded.name))
    for note in results["notes"]:
        console.print(f"note: {escape(note)}")
    console.print(f"written to {escape(str(folder))}: results.json, table.md{_plots(results)}", soft_wrap=True)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    second: Annotated[Path, typer.Argument(help="Another one; differences are second less first.")],
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Compare two finished runs: the edited half of each, or the baseline where a recipe has no edits.

    Where both saw the same questions, the difference comes with its paired bootstrap interval, the flips and
    McNemar's exact test; with images also with a p-value from resampled images.
    """
    from attn_eval.comparison import compare_results, left_out
    from attn_eval.report import console_table
    from attn_eval.run_log import load_results

    runs = load_results(first), load_results(second)
    compared, notes = compare_results(*runs), left_out(*runs)
    if as_json:
        print(json.dumps({"first": str(first), "second": str(second), "metrics": compared, "notes": notes}, indent=2))
        return
    if not compared:
        raise EvaluationError(f"{first} and {second} have no metric in common")
    # Not every entry is paired, and only then is it known how many samples it rests on.
    rows = [{"samples": "", **entry, "baseline": entry["first"], "edited": entry["second"]} for entry in compared]
    console = out()
    console.print(console_table(rows, f"{first} -> {second}", runs=("first", "second")))
    for name, folder, results in zip(("first", "second"), (first, second), runs, strict=True):
        edits = ", ".join(edit["method"] for edit in results["edits"]) or "no edits"
        console.print(f"{name}: {escape(str(folder))} ({escape(results['recipe']['name'])}; {edits})", soft_wrap=True)
    for note in notes:
        console.print(f"note: {escape(note)}")


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="A benchmark with images: pope, chair, mme or amber.")],
    answers: Annotated[
        list[Path], typer.Option(help="A file of answers in the published format; may be given again (one a split).")
    ],
    edited: Annotated[
        list[Path] | None, typer.Option(help="The answers of another run to the same questions, to be compared.")
    ] = None,
    questions: Annotated[
        list[str] | None, typer.Option(help="A published question file; may be given again (one a split).")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A key of the task, as in a recipe: --set instances=instances_val2014.json",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 42,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Score answers that are there already: no model, no images.

    A run writes its answers in this form, too, to answers/TASK/RUN in its folder.
    """
    from attn_eval.answers import image_task, score_answers
    from attn_eval.recipe import parse_override
    from attn_eval.report import console_table

    settings: dict[str, Any] = dict(parse_override(override) for override in overrides or [])
    if questions:
        settings["questions"] = questions
    benchmark = image_task(task, settings)
    metrics, notes = score_answers(benchmark, answers, edited or [], seed)
    if as_json:
        print(json.dumps({"task": task, "metrics": metrics, "notes": notes}, indent=2))
        return
    console = out()
    console.print(console_table(metrics, task))
    for note in notes:
        console.print(f"note: {escape(note)}")


@app.command("find-sinks")
def find_sinks(
    model: Annotated[str, typer.Argument(help="A folder, a model id of the hub, or testbed-lm.")],
    prompt: Annotated[str | None, typer.Option(help="The text to look at; by default a few sentences.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image of the prompt; may be given again, in the prompt's order.")
    ] = None,
    tau: Annotated[float, typer.Option(min=0.0, help="How far a dimension stands out, as VAR's tau.")] = 20.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Find the hidden dimensions in which a model's sink tokens show: [bold]dims[/bold] of the method var.

    One forward; what enters each decoder layer from 2 on is compared with its root mean square.
    """
    from attn_eval.probing import measured_sinks

    silence_loading_bars()
    measured = measured_sinks(model, prompt, image or [], tau, dtype, device)
    if as_json:
        print(json.dumps(measured, indent=2))
        return
    table = Table(title=f"{measured['class']}: {measured['tokens']} tokens, {measured['hidden_size']} dimensions")
    for column in ("dim", "tells sinks", f"layers of {len(measured['layers'])}", "tokens", "strongest", "at token"):
        table.add_column(column)
    for about in measured["found"]:
        table.add_row(
            str(about["dim"]),
            "yes" if about["tells_sinks"] else "no",
            str(len(about["layers"])),
            f"{about['share_of_tokens']:.0%}",
            f"{about['strongest']:.1f} in layer {about['layer']}",
            f"{about['position']} {escape(repr(about['token']))}",
        )
    if measured["found"]:
        out().print(table)
    if measured["dims"]:
        out().print(f"for var: dims={tuple(measured['dims'])}")
    else:
        out().print(
            f"no dimension tells sinks at tau {tau:g}: the strongest activation is {measured['strongest']:.1f} times the "
            "root mean square. Give another prompt, or a smaller --tau (and the same to var)."
        )


@app.command("score-heads")
def score_heads(
    model: Annotated[str, typer.Argument(help="A folder or a model id of the hub: a vision-language model.")],
    prompt: Annotated[str, typer.Option(help="The question about the image.")],
    image: Annotated[
        list[Path], typer.Option(help="An image of the prompt; may be given again, in the prompt's order.")
    ],
    output: Annotated[Path, typer.Option("-o", "--out", help="Where head_scores.json and head_scores.png go.")] = Path(
        "results/head-scores"
    ),
    top: Annotated[int, typer.Option(min=1, help="So many heads in the table; the file has all.")] = 20,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The file's content in place of the table.")] = False,
) -> None:
    """Measure how much each head looks at the image: its weight there, in the prompt's last row and over the text.

    One forward, without attention maps in memory.
    """
    from attn_eval.probing import draw_head_scores, scored_heads

    if output.exists() and not output.is_dir():
        raise EvaluationError(f"the output {output} is a file: give a folder with -o")
    silence_loading_bars()
    measured = scored_heads(model, prompt, image, dtype, device)
    output.mkdir(parents=True, exist_ok=True)
    written = json.dumps(measured, indent=2)
    (output / "head_scores.json").write_text(written + "\n", encoding="utf-8")
    draw_head_scores(measured, output / "head_scores.png")
    if as_json:
        print(written)
        return
    console = out()
    for name, about in measured["measures"].items():
        table = Table(title=f"{name}: {about['meaning']}")
        for column in ("layer", "head", "score"):
            table.add_column(column, justify="right")
        for row in about["ranked"][:top]:
            table.add_row(str(row["layer"]), str(row["head"]), f"{row['score']:.4f}")
        console.print(table)
    for name, reason in measured["missing"].items():
        console.print(f"{name} is missing: {reason}", markup=False, soft_wrap=True)
    console.print(f"{measured['image_tokens']} of {measured['tokens']} tokens are the image's")
    console.print(f"written to {escape(str(output))}: head_scores.json, head_scores.png", soft_wrap=True)


@app.command()
def recall(
    model: Annotated[str, typer.Argument(help="A folder, a model id of the hub, or testbed-lm.")],
    edits: Annotated[
        list[str],
        typer.Option(
            "--edit",
            metavar="'METHOD PARAMETER=VALUE ...'",
            help="A method that chooses keys, its parameters behind it; may be given again: --edit streaming "
            "--edit 'xattention threshold=0.8 block=64'",
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="The text to look at, in place of the text that ships.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with that text.")] = None,
    length: Annotated[int, typer.Option(min=2, help="So many tokens of the text that ships.")] = 2048,
    rows: Annotated[
        int,
        typer.Option(min=1, help="So many rows of each head, evenly spaced, are measured; the time grows with them."),
    ] = 256,
    output: Annotated[Path, typer.Option("-o", "--out", help="Where recall.json and recall.png go.")] = Path(
        "results/recall"
    ),
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The file's content in place of the tables.")] = False,
) -> None:
    """Measure what sparse methods keep of a model's attention: recall, density and output error by layer and head.

    [bold]Recall[/bold] is the share of dense attention on the keys that a method
    visits: 1 loses nothing. A high mean hides rows that lose all: look at the
    5th percentile, and at the lowest head, since few heads do the retrieval.
    [bold]Density[/bold] is the share of keys visited: what is left to compute.

    The model runs dense, once: all methods choose from the same queries and keys,
    and no layer hands its losses on. What that does to answers is measured by
    [bold]attn-hooks run[/bold].

      attn-hooks recall testbed-lm --edit streaming --edit xattention
    """
    from attn_eval.recall import draw_recall, layers_table, measured_recall, totals_table

    if output.exists() and not output.is_dir():
        raise EvaluationError(f"the output {output} is a file: give a folder with -o")
    if prompt is not None and prompt_file is not None:
        raise EvaluationError("give --prompt or --prompt-file, not both")
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"the prompt {prompt_file} can't be read as UTF-8 text: {error}") from error
    silence_loading_bars()
    measured = measured_recall(model, edits, prompt, length, rows, dtype, device)
    output.mkdir(parents=True, exist_ok=True)
    written = json.dumps(measured, indent=2)
    (output / "recall.json").write_text(written + "\n", encoding="utf-8")
    draw_recall(measured, output / "recall.png")
    if as_json:
        print(written)
        return
    console = out()
    console.print(totals_table(measured))
    for about in measured["edits"]:
        console.print(layers_table(measured, about))
    console.print(f"written to {escape(str(output))}: recall.json, recall.png", soft_wrap=True)


def main() -> None:
    """The entry point: runs the command and turns every error of a user's into one line and exit code 2."""
    try:
        code = app(standalone_mode=False) if len(sys.argv) > 1 else app(["--help"], standalone_mode=False)
        if code == INTERRUPTED:
            _fail("stopped; the same command goes on where it was", INTERRUPTED)
        sys.exit(code or 0)
    except ValueError as error:
        if not _is_for_the_user(error):
            raise
        _fail(str(error), USER_ERROR)
    except Exception as error:
        # A wrong option or argument: typer's own kind of error, whose class it doesn't export.
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "attn-hooks"
        _fail(f"{explain().rstrip('.')}. See '{command} --help'.", USER_ERROR)


def _is_for_the_user(error: ValueError) -> bool:
    if isinstance(error, EvaluationError):
        return True
    import attn_hooks

    return isinstance(error, attn_hooks.AttnHooksError)


def _fail(message: str, code: int) -> None:
    print(f"attn-hooks: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _describe(method: Any) -> dict[str, Any]:
    schema = method.model_json_schema()
    module = inspect.getmodule(method)
    summary = (inspect.getdoc(module) or inspect.getdoc(method) or "").split("\n\n")[0]
    return {
        "summary": " ".join(summary.split()),
        "source": method.source,
        "reads": sorted(method.reads),
        "writes": method.writes,
        "scope": method.scope,
        "head_indexed": method.head_indexed,
        "needs_lengths": method.needs_lengths,
        "keeps_state": method.keeps_state,
        "crosses_layers": method.crosses_layers,
        "parameters": {"properties": schema.get("properties", {}), "required": schema.get("required", [])},
    }


def _show_layout(model: str, prompt: str, images: list[Path], as_json: bool) -> None:
    """A prompt's tokens, span by span."""
    import attn_hooks
    from attn_eval.loading import model_skeleton, processed_prompt
    from attn_hooks.model_info import vision_of

    inputs, tokenizer = processed_prompt(model, prompt, images)
    skeleton = model_skeleton(model)
    layout = attn_hooks.layout_of(skeleton, **inputs)
    vision = vision_of(skeleton.config)
    by_cross_attention = vision is not None and vision.by_cross_attention
    if images and not layout.images and not by_cross_attention:
        held = (
            "names no image token"
            if vision is None
            else f"has image token {vision.image_token_id}, and it is not there"
        )
        raise EvaluationError(f"no token of the prompt is an image's: the config of {model!r} {held}")
    rows: list[dict[str, Any]] = []
    for span in layout.spans(0):
        found = layout.images_of(0)[span.image] if span.image is not None else None
        held = "" if found else tokenizer.decode(inputs["input_ids"][0, span.start : span.stop])
        kind = "video" if found and found.video else span.kind.name.lower()
        grid = found.grid_text() if found else None
        rows.append(
            {"start": span.start, "stop": span.stop, "kind": kind, "image": span.image, "grid": grid, "text": held}
        )
    if as_json:
        print(json.dumps({"model": model, "by_cross_attention": by_cross_attention, "spans": rows}, indent=2))
        return
    table = Table(title=f"{len(inputs['input_ids'][0])} tokens")
    for column in ("start", "stop", "holds", "grid of patches", "text"):
        table.add_column(column)
    for row in rows:
        holds = row["kind"] if row["image"] is None else f"{row['kind']} {row['image']}"
        held = row["text"] if len(row["text"]) <= SHOWN_TEXT else row["text"][: SHOWN_TEXT - 3] + "..."
        table.add_row(str(row["start"]), str(row["stop"]), holds, row["grid"] or "", escape(repr(held) if held else ""))
    out().print(table)
    if by_cross_attention:
        out().print("images reach this model through cross attention: no key of its self-attention is an image's")


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    """Layers that are alike in one line, e.g. ``0-7`` or ``0, 2, 4``."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer in layers:
        groups.setdefault(tuple(value for key, value in layer.items() if key != "layer"), []).append(layer["layer"])
    table = Table()
    for column in ("layers", "heads", "kv heads", "head dim", "sliding window", "softcap", "learned sinks"):
        table.add_column(column)
    for shape, indices in groups.items():
        consecutive = len(indices) > 1 and indices[-1] - indices[0] + 1 == len(indices)
        shown = f"{indices[0]}-{indices[-1]}" if consecutive else ", ".join(map(str, indices))
        *numbers, learned_sinks = shape
        table.add_row(
            shown, *("-" if value is None else f"{value:g}" for value in numbers), "yes" if learned_sinks else "-"
        )
    return table


def _plots(results: dict[str, Any]) -> str:
    drawn = [f"heatmap_{name}.png" for name, task in results["tasks"].items() if task["grid"]]
    drawn += dict.fromkeys(f"figures_{metric['task']}.png" for metric in results["metrics"] if "unit" in metric)
    return "".join(f", {name}" for name in drawn)


if __name__ == "__main__":
    main()
