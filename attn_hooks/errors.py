"""Every error that attn_hooks raises, in one catalogue: what the user reads, why it came, and the way out.

``docs/errors.md`` is written from this table (``python -m attn_hooks.errors``) and a test holds the two together.
"""

from __future__ import annotations

from typing import NamedTuple


class AttnHooksError(ValueError):
    """Raised for anything that a user asked for and that cannot be done as asked.

    ``code`` names the row of the catalogue and of docs/errors.md, ``details`` what its message was filled with.
    """

    def __init__(self, code: str, message: str, details: dict[str, object] | None = None) -> None:
        super().__init__(f"{message} [{code}]")
        self.code, self.details = code, details or {}


class UnsupportedModelError(AttnHooksError):
    """The model cannot be edited, whatever the edit."""


class UnsupportedArgumentError(AttnHooksError):
    """An attention call carries something that cannot be honoured exactly together with the edits in force."""


class EditError(AttnHooksError):
    """The edit does not fit the model, the phase or the other edits."""


class Entry(NamedTuple):
    """One row: the class raised, the message's template, and what docs/errors.md says of it."""

    kind: type[AttnHooksError]
    message: str
    cause: str
    fix: str


CATALOGUE: dict[str, Entry] = {
    "no-attention-interface": Entry(
        UnsupportedModelError,
        "{model}: no attention of this model goes through transformers' AttentionInterface, so there is nothing to "
        "hook. {detail}",
        "The modeling file computes attention by itself (Bloom, Falcon, GPT-J, MPT, ...) or has none (Mamba, RWKV).",
        "Use a model whose modeling file calls ALL_ATTENTION_FUNCTIONS; docs/compatibility.md lists them.",
    ),
    "no-causal-attention": Entry(
        UnsupportedModelError,
        "{model}: none of its attention modules is causal self-attention ({detail}).",
        "Encoders and cross attention are not edited: every method shipped is defined on causal rows.",
        "Wrap the decoder, or a decoder-only model.",
    ),
    "unsupported-backend": Entry(
        UnsupportedModelError,
        "{model}: its attention runs on {backend!r}, whose calls the engine cannot read. Call "
        "model.set_attn_implementation('sdpa') (or 'eager') before wrapping.",
        "flash_attention_*, flex_attention, paged and hub kernels get packed inputs or opaque masks.",
        "Switch to 'sdpa' first: on a GPU it runs the same flash kernels.",
    ),
    "backend-drops": Entry(
        UnsupportedModelError,
        "{model}: its attention needs {argument}, which the backend {backend!r} drops in silence in this version of "
        "transformers. Call model.set_attn_implementation('eager') before wrapping.",
        "transformers up to 5.17 lets Gemma 2 run on sdpa without its softcap; edited and unedited layers would differ.",
        "Switch to 'eager' first, or update transformers.",
    ),
    "backend-branch": Entry(
        UnsupportedModelError,
        "{model}: {module_class} takes another path for an attention implementation that it does not know by name, so "
        "the same backend would not run. It cannot be wrapped.",
        "Some sparse-attention models compare config._attn_implementation with 'sdpa' or 'eager' inside the module.",
        "None yet; docs/compatibility.md names these families.",
    ),
    "meta-device": Entry(
        UnsupportedModelError,
        "{model}: its parameters are on the meta device, so there is no model to edit yet. Load the weights first "
        "(from_pretrained without init_empty_weights), then wrap.",
        "wrap() got a skeleton made under init_empty_weights or torch.device('meta').",
        "Load the weights, then wrap. Models offloaded by accelerate are fine.",
    ),
    "not-a-model": Entry(
        UnsupportedModelError,
        "wrap() takes a transformers model, got {given}.",
        "The first argument is not a torch.nn.Module with transformers attention inside.",
        "Pass the model object itself, for a pipeline its .model.",
    ),
    "wrapped-elsewhere": Entry(
        EditError,
        "{model}: its attention is already edited through another model object, which holds this one or shares its "
        "decoder. Unwrap that one first.",
        "A part of a wrapped model (or a copy of a part) was given, or two models share one decoder.",
        "Call wrap, editing and unwrap on one and the same object.",
    ),
    "not-wrapped": Entry(
        AttnHooksError,
        "{model} is not wrapped, so there is nothing to {what}.",
        "report() or save_edits() on a model without edits in force.",
        "Call attn_hooks.wrap(model, ...) first, or call it inside `with attn_hooks.editing(...)`.",
    ),
    "unknown-method": Entry(
        EditError,
        "There is no method named {name!r}. {suggestion}",
        "A misspelt name, or a method of a package that is not installed.",
        "`attn-hooks methods` lists the names.",
    ),
    "bad-parameters": Entry(
        EditError,
        "{method}: {detail}",
        "A parameter is unknown, of the wrong type or out of its range.",
        "The message names the parameter and what it may be; `attn-hooks methods --json` has the schemas.",
    ),
    "bad-edit": Entry(
        EditError,
        "An edit is a method's name, a config such as ACT(beta=0.4), a mapping with 'method', or the path of a recipe; "
        "got {given}.",
        "Something else was passed to wrap(), editing() or explain().",
        "Pass one of the four.",
    ),
    "bad-recipe": Entry(
        EditError,
        "{path}: {detail}",
        "The recipe does not exist, is not YAML, or has no list under `edits`.",
        "Mend the file; recipes/ has examples.",
    ),
    "duplicate-method": Entry(
        EditError,
        "Two packages claim the method name {name!r}: {first} and {second}.",
        "Entry points of the group attn_hooks.methods collide with each other or with a shipped method.",
        "Uninstall one of them, or ask its author to rename.",
    ),
    "layer-out-of-range": Entry(
        EditError,
        "{method}: layer {layer} does not exist or has no editable attention in {model}; its layers are {layers}.",
        "A layer index beyond the model, or a layer without causal attention (Mamba layers of hybrids).",
        "Layers count from 0; `attn-hooks info MODEL` lists them.",
    ),
    "head-out-of-range": Entry(
        EditError,
        "{method}: head {head} does not exist in layer {layer} of {model}, which has query heads 0 to {last}.",
        "Heads are query heads, counted from 0 over all ranks.",
        "Choose a head that exists; `attn-hooks info MODEL` lists them.",
    ),
    "wrong-shape": Entry(
        EditError,
        "{method}: {parameter} has shape {given}, {model} needs {expected}.",
        "A tensor of gains or offsets was made for another model.",
        "Give it the shape in the message: layers, query heads, head_dim.",
    ),
    "no-layers": Entry(
        EditError,
        "{method}: no layer of {model} is selected ({detail}), so the edit would never act.",
        "A default layer range that is empty on a very small model, or an empty list.",
        "Pass `layers` explicitly.",
    ),
    "no-pattern": Entry(
        EditError,
        "{method} chooses no keys, so there is no recall to measure: every visible key keeps being visited.",
        "Recall is the share of attention on the keys that a sparse method visits; this method changes it otherwise.",
        "Measure methods of docs/methods/sparse.md; `attn-hooks run` compares answers under any method.",
    ),
    "needs-image": Entry(
        EditError,
        "{method} needs image tokens, and {model} has none: it is a text model.",
        "The method reads or writes the keys of an image.",
        "Use a vision-language model, or a method without image tokens.",
    ),
    "image-by-cross-attention": Entry(
        EditError,
        "{method} needs the image's tokens among the keys of self-attention, and {model} reads its images through cross "
        "attention, which is not edited.",
        "Mllama and its like put one mark for an image among the tokens, and the image itself into layers of their own.",
        "Use a model that puts image tokens into the prompt (docs/images.md lists families), or a method without image tokens.",
    ),
    "too-many-images": Entry(
        EditError,
        "Row {row} of the batch has more than {most} images or video frames on their own, and one byte a key cannot tell them "
        "apart.",
        "The layout of a prompt keeps one byte for each key.",
        "Give fewer images in one prompt; frames of a video count as one where the family marks videos.",
    ),
    "no-image-in-prompt": Entry(
        EditError,
        "{method} needs the image's tokens, and no prompt of this call to {model} holds the image token {image_token_id}.",
        "A prompt without an image, or embeddings given in place of token ids.",
        "Give the prompt its image and its token ids, or leave the edit out for text.",
    ),
    "unknown-sink-dims": Entry(
        EditError,
        "{method}: nobody has published the hidden dimensions in which the sinks of {model} ({backbone}) show. Measure them with "
        "`attn-hooks find-sinks MODEL` and pass dims=(...).",
        "VAR finds sinks by massive activations in a few dimensions, which differ from one language model to the next.",
        "`attn-hooks find-sinks MODEL` prints them; pass them as `dims`.",
    ),
    "no-class-attention": Entry(
        EditError,
        "{method} needs the attention of the vision tower's class token to each patch, and {model} does not give it: {reason}.",
        "The token streams are chosen by the attention of CLIP's class token, which is read while the tower runs.",
        "Use a LLaVA model with a CLIP tower, and give it the images as pixel_values, not as features.",
    ),
    "no-layer-input": Entry(
        UnsupportedModelError,
        "{method} reads what enters a decoder layer, and that of layer {layer} of {model} could not be seen: no numbered module "
        "stands around the attention, or it was run without being called, or on other tokens than its attention.",
        "The hidden states come from a hook on the decoder layer, the innermost numbered module around the attention.",
        "Leave the layer out of the edit, or use a method that does not read hidden states.",
    ),
    "cannot-compose": Entry(
        EditError,
        "{first} and {second} cannot stand together: {reason}.",
        "Both claim the same thing and no order between them is defined.",
        "Wrap with one of the two.",
    ),
    "phase": Entry(
        EditError,
        "{method} is not defined for {phase} (layer {layer} of {model}): {reason}",
        "The method needs the whole prompt in one forward, or is defined for the prompt only.",
        "The message says what to change.",
    ),
    "no-prefill": Entry(
        EditError,
        "{method} needs what it computed on the prompt, and this cache was filled without it (layer {layer} of "
        "{model}). Wrap before the prefill.",
        "The model was wrapped between prefill and decode, or the cache comes from another model.",
        "Run the prompt under the edit, or pass a fresh cache.",
    ),
    "batch-changed": Entry(
        EditError,
        "{model}: the cache holds {cached} sequences and this call has {given}, so what the edits know of each sequence "
        "cannot be matched to it.",
        "Sequences were added to or taken out of a cache between two calls.",
        "Start a fresh cache, or keep the batch as it is.",
    ),
    "static-step": Entry(
        UnsupportedArgumentError,
        "{model}: this forward cannot be compiled into one graph or captured in a CUDA graph under the edits in force: "
        "{reason}.",
        "Only decode steps can, with a static cache whose prompt ran in eager under the same edits, once no token to come "
        "changes what an edit does; the message says what is missing.",
        "Run the prompt in eager under the edits, with a static cache and without gradients; or compile without fullgraph, which "
        "breaks off here and goes on in eager.",
    ),
    "token-shape": Entry(
        EditError,
        "input_ids of shape {given}: the layout is told of prompts (batch, tokens).",
        "A processor gives batches where it is asked for tensors.",
        "Call the processor with return_tensors='pt', or add the batch with input_ids[None].",
    ),
    "no-pixels": Entry(
        EditError,
        "{model}: {method} changes the pixels of a prompt's images, and this prompt came without them (pixel_values).",
        "Some families' generate() encodes images first and hands over features alone.",
        "Give the model pixel_values, or use a method that does not change the image.",
    ),
    "no-picture": Entry(
        EditError,
        "{model}: {method} masks pixels of image {image} of prompt {sample}, and {reason}.",
        "The mask lies on one picture of the whole image, as LLaVA, Qwen-VL and Gemma 3 are given it, and is made for a question.",
        "Give images that the processor leaves whole (no crops or tiles, no videos), each before its question; or use vcd, which "
        "takes pixels as they are.",
    ),
    "no-black": Entry(
        EditError,
        "{model}: {method} blackens pixels, and what this model is given for black is unknown: its vision tower, {tower}, does not "
        "tell.",
        "Pixels come normalised by the mean and standard deviation of the processor, which the model does not hold.",
        "Give image_mean=processor.image_processor.image_mean and image_std=processor.image_processor.image_std.",
    ),
    "no-companions": Entry(
        UnsupportedArgumentError,
        "{model}: {method} needs rows without the image beside the prompts in one batch, and {reason}.",
        "Heads are compared with and without the image layer by layer, so both prompts run together.",
        "Give the prompt with a DynamicCache and a 2-D attention mask; in families that build masks of their own, use "
        "another method.",
    ),
    "stream-outside": Entry(
        UnsupportedModelError,
        "{model}: {method} needs the logits of the model's own forward, and this family's generate() runs the language model "
        "inside it alone.",
        "The second stream of a method runs in hooks around the model's forward; InstructBLIP and BLIP-2 generate without it.",
        "Use a method without a second stream on this model, such as var, pai with gamma=1, or spin.",
    ),
    "stream-beams": Entry(
        UnsupportedArgumentError,
        "{model}: for beams and for several sequences a prompt {method} needs each prompt's part of {argument}, and its entries "
        "are neither images, nor the patches of their grids, nor tiles of equally many tokens.",
        "transformers repeats them entry by entry, which would mix the prompts.",
        "Generate one sequence a prompt without beams; call generate() again for another sample.",
    ),
    "stream-cache": Entry(
        UnsupportedArgumentError,
        "{model}: the main cache's {name} was called, and the second stream of {method} cannot follow it.",
        "Assisted and contrastive generation take tokens back or repeat rows; the second stream has a cache of its own.",
        "Generate greedily, by sampling or with beams.",
    ),
    "stream-no-tokens": Entry(
        UnsupportedArgumentError,
        "{method} finds a prompt's images by their tokens, and {model} was given embeddings (inputs_embeds) alone.",
        "Features that were put among the embeddings beforehand look like any others.",
        "Give input_ids and pixel_values.",
    ),
    "stream-no-prompt": Entry(
        EditError,
        "{model}: {method} was wrapped after the prompt went into this cache, so that its second stream knows no prompt.",
        "The second stream starts with the prompt, images included.",
        "Wrap first, then run the prompt.",
    ),
    "stream-later-image": Entry(
        UnsupportedArgumentError,
        "{model}: an image came after the first forward of its sequence, and the second stream of {method} was made of the first.",
        "Later turns may bring text; what a later image is to the second stream is not defined.",
        "Give all images in the first forward, or start the sequence anew with the whole conversation.",
    ),
    "stream-no-text": Entry(
        UnsupportedArgumentError,
        "{model}: a prompt has nothing but its image, and the second stream of {method} is the prompt without it.",
        "A model has no next token after nothing.",
        "Begin the prompt with a token of text, such as BOS.",
    ),
    "stream-positions": Entry(
        UnsupportedArgumentError,
        "{model}: logits_to_keep is a tensor of positions, and {method} makes the next token's logits from the last ones of two "
        "streams.",
        "The same positions are other tokens in a second stream.",
        "Give logits_to_keep as a number, or leave it out and take the positions from the result.",
    ),
    "candidates": Entry(
        UnsupportedModelError,
        "{model}: {method} tries all candidates for the next token in one forward and takes them back, and here {reason}.",
        "Candidates stand at one position under a mask of their own, which these layers don't take.",
        "Use it on a model without them, such as LLaVA.",
    ),
    "stream-captured": Entry(
        UnsupportedArgumentError,
        "{model}: this forward is being captured in a CUDA graph, and {method} decides on the host whether its second stream runs.",
        "A captured graph cannot take that decision.",
        "Leave the forward uncaptured under this method.",
    ),
    "stream-training": Entry(
        UnsupportedArgumentError,
        "{model}: labels were given, and {method} changes the logits after the model has made its loss of them.",
        "The loss would be of the unedited logits.",
        "Compute the loss from the returned logits, or unwrap for training.",
    ),
    "packed-sequences": Entry(
        UnsupportedArgumentError,
        "{model}: several sequences are packed in one row (position_ids start again inside it), and the edits in force "
        "count positions from one beginning.",
        "A padding-free collator, or hand-made position_ids.",
        "Pad the batch instead, or unwrap for this call.",
    ),
    "argument": Entry(
        UnsupportedArgumentError,
        "{model}, layer {layer}: the attention call carries {argument!r}, which cannot be honoured exactly together with "
        "{methods}. {detail}",
        "The engine honours masks, softcap, s_aux, sliding windows and dropout; anything else is refused, never dropped.",
        "Unwrap for this call, or leave this layer out of the edit.",
    ),
    "cross-attention": Entry(
        UnsupportedArgumentError,
        "{model}, layer {layer}: this call is cross attention ({detail}), which {methods} does not edit.",
        "A module that is causal self-attention at wrap time got keys of another sequence.",
        "Leave this layer out of the edit.",
    ),
    "tensor-parallel": Entry(
        UnsupportedModelError,
        "{model}, layer {layer}: {detail}.",
        "The tensor-parallel plan does not split q_proj, k_proj and v_proj into whole, contiguous heads on each rank.",
        "Use a plan and a number of ranks that do (it must divide the key and value heads), or run on one device.",
    ),
    "context-parallel": Entry(
        UnsupportedArgumentError,
        "{model}: torch's context parallelism is active, each rank sees a part of the sequence only, and {methods} needs "
        "whole rows.",
        "The forward runs inside torch.distributed's context_parallel.",
        "Use tensor parallelism, or unwrap.",
    ),
    "not-saved": Entry(
        EditError,
        "{method} holds {value}, which cannot be saved.",
        "It is made of models, and saved edits are parameters and tensors.",
        "Build this edit in Python each time, or save it without that parameter.",
    ),
    "bad-saved-edits": Entry(
        EditError,
        "{path}: {detail}",
        "edits.json is missing, from a newer format, or does not match its schema.",
        "Save again with save_edits(), or update attn-hooks.",
    ),
    "spans-batch": Entry(
        EditError,
        "{method}: spans were given for {given} samples and the batch has {batch}.",
        "Spans belong to prompts: one list of (start, stop) for each, or one list for all.",
        "Pass as many lists as prompts; with beams, one list for each prompt is enough.",
    ),
    "span-out-of-prompt": Entry(
        EditError,
        "{method}: the span ({start}, {stop}) ends after prompt {row}, which has {length} tokens.",
        "Spans count tokens from each prompt's first real token; these belong to another prompt or tokenizer.",
        "Take the spans from find_spans() on the very prompt, or set prompt_length for a prompt given in parts.",
    ),
    "span-not-found": Entry(
        EditError,
        "The text {substring!r} does not stand in the prompt.",
        "find_spans() looks for the exact characters, spaces and case included.",
        "Copy the substring from the prompt as it is.",
    ),
    "slow-tokenizer": Entry(
        EditError,
        "{tokenizer} gives no character offsets, which find_spans() needs.",
        "A tokenizer without a fast (Rust) implementation.",
        "Load the fast tokenizer, or give the spans as token positions.",
    ),
    "no-output-projection": Entry(
        UnsupportedModelError,
        "{model}, layer {layer}: {module_class} has no projection that takes the outputs of its {heads} heads side by side, so "
        "{method} has no place to act.",
        "The output projection is found by its name (o_proj, out_proj, dense, ...) and its width. DeepSeek V4 projects groups of "
        "heads apart, JetMoe has experts there.",
        "Use a model of another family; `wrap(model, HeadAffine(...))` edits head outputs at the attention call instead.",
    ),
    "mixed-batch": Entry(
        UnsupportedArgumentError,
        "{method}: adapter_names={names} asks for an adapter for each sample, and adapters of {method} act on the whole batch.",
        "One batch with several adapters is LoRA's machinery in PEFT.",
        "Make a batch for each adapter and call set_adapter() before it.",
    ),
    "not-mergeable": Entry(
        EditError,
        "LoFiT: {adapters} cannot be merged into {module}: {reason}. Keep the adapter beside the model, or unload() it.",
        "W(z + v) + b = Wz + (b + Wv) needs the projection's weights as they are: a Linear or Conv1D, unquantised, whole on this "
        "rank, and with no other adapter around it.",
        "Serve the adapter unmerged: it costs one addition a layer. For a merged model load the base unquantised on one rank.",
    ),
    "red-not-merged": Entry(
        EditError,
        "RED: {adapters} cannot be merged: adapters on feed-forward networks are a baseline here. Keep the adapter beside the "
        "model, or unload() it.",
        "merge_adapter() or merge_and_unload() on a model of RedConfig.",
        "Use the adapter unmerged; LofitConfig and LoRA can be merged.",
    ),
    "no-feed-forward": Entry(
        UnsupportedModelError,
        "RED: layer {layer} of {model} has not exactly one projection that ends its feed-forward network.",
        "It is found by its name (down_proj, fc2, c_proj, ...) in the layer or in one module of it. Layers of experts have many.",
        "Give `layers` without that one, or use a model without experts.",
    ),
    "merge-not-finite": Entry(
        EditError,
        "{adapters} would make {module} hold values that are not finite, so nothing was merged into it.",
        "The adapter holds NaN or infinity, or its offsets overflow the dtype of the model.",
        "Train again with a smaller learning rate, or merge in float32.",
    ),
    "merged-bias-lost": Entry(
        EditError,
        "{model}: this merged model cannot be saved, since the modeling file of its family builds {module} without a bias and "
        "loading would drop what was merged, in silence. Save the adapter instead, before merge_and_unload().",
        "An offset on head outputs becomes a bias of the output projection; Mistral, Qwen2, Mixtral, Phi-3, GLM-4 and others never "
        "have one.",
        "Ship the adapter (a few kilobytes) beside the base model.",
    ),
    "bad-adapter": Entry(
        EditError,
        "lofit:{path}: {detail}.",
        "It is no folder or repository with an adapter that attn_hooks.lofit trained, or one of scales, which HeadAffine does not "
        "apply.",
        "Give the folder that save_pretrained() wrote; put an adapter of scales on with PeftModel.from_pretrained(model, path).",
    ),
    "gated-heads": Entry(
        EditError,
        "{method}: layer {layer} of {model} gates or normalises the head outputs before its output projection, and the vectors "
        "belong behind that. Put the adapter on with PeftModel.from_pretrained(model, path).",
        "PEFT's wrapper lies on the projection, an edit on the attention call; in Qwen3-Next, Qwen3.5, BitNet and others something "
        "stands between the two.",
        "Load the adapter with PEFT; other edits go on top of it with wrap().",
    ),
    "nothing-saved": Entry(
        EditError,
        "{method}:{path} asks for what was saved under a path, and {method} has only parameters.",
        "name:path is for methods whose tensors are trained or measured elsewhere, such as lofit.",
        "Give {'method': name, ...} with the parameters, or the path of a recipe.",
    ),
    "which-adapter": Entry(
        EditError,
        "{model}: heads are ranked by the vectors of one adapter of LoFiT; asked for {wanted}, and the model has {known}.",
        "The model was not trained under LofitConfig, the adapter has another name, or several are active at once.",
        "Give the model that get_peft_model() returned, before unload(), and adapter_name if it has several.",
    ),
    "vectors-not-finite": Entry(
        EditError,
        "LoFiT: the vector of head {head} in layer {layer} holds values that are not finite, so heads cannot be ranked.",
        "Training has diverged.",
        "Train again with a smaller learning rate, and look at the loss first.",
    ),
    "l1-without-effect": Entry(
        EditError,
        "LoFiT: the L1 penalty would have no effect: {reason}.",
        "It adds lambda * sign to the vectors' gradients as the optimizer steps. DeepSpeed's steps flat copies instead; an "
        "optimizer made before get_peft_model() steps nothing of LoFiT.",
        "Make the optimizer of the adapted model's trainable parameters, and select heads on one process a model (or with DDP).",
    ),
    "bad-head-outputs": Entry(
        EditError,
        "Probes of head outputs: {detail}.",
        "Probes and ITI's directions need outputs of true and of false texts, one label (and one group) a text, all finite.",
        "Give as many labels as texts were run, with both classes in the training part and in the validation part.",
    ),
    "bad-top-heads": Entry(
        EditError,
        "{path}: {detail}.",
        "It is not one of the top_heads files of the paper's repository.",
        "Give such a file, or a list of pairs (layer, head) to LofitConfig directly.",
    ),
    "adapter-format": Entry(
        EditError,
        "LoFiT: this adapter has format version {found}, and this version of attn-hooks reads up to {known}.",
        "It was saved by a newer attn-hooks.",
        "Update attn-hooks.",
    ),
    "foreign-lofit": Entry(
        AttnHooksError,
        "PEFT {version} has a method {name} that is not attn-hooks' own ({owner}), so this config would be read by that one.",
        "A later PEFT, or another package, has registered the name first.",
        "Use that one's config, or the PEFT version that attn-hooks was tested with.",
    ),
    "missing-data": Entry(
        AttnHooksError,
        "{what} is not part of this installation (looked in {path}).",
        "A partial checkout or a wheel built without its data.",
        "Reinstall attn-hooks, or run from a full checkout.",
    ),
}


def error(code: str, **details: object) -> AttnHooksError:
    """The error of a catalogue row, its message filled in; the caller raises it."""
    entry = CATALOGUE[code]
    return entry.kind(code, entry.message.format(**details), details)


def catalogue_as_markdown() -> str:
    """The text of docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "Each error ends with its code in square brackets. All are `attn_hooks.AttnHooksError`, which is a `ValueError`.",
        "This page is written by `python -m attn_hooks.errors > docs/errors.md`; a test holds it to the code.",
        "",
        "| code | message | cause | fix |",
        "|---|---|---|---|",
    ]
    for code, entry in CATALOGUE.items():
        cells = (cell.replace("|", "\\|") for cell in (f"`{code}`", entry.message, entry.cause, entry.fix))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(catalogue_as_markdown(), end="")
