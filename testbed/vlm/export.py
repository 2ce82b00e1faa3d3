"""Make a model's folder of a checkpoint's file of weights: config, processor and chat template beside them.

python -m testbed.vlm.export out/vlm/final.safetensors                                    # models/testbed-vlm
python -m testbed.vlm.export out/vlm/at_25.safetensors --out models/testbed-vlm/weak
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from testbed.vlm import MODEL
from testbed.vlm.layout import IMAGE_SIZE
from testbed.vlm.measure import CAPTION_TOKENS
from testbed.vlm.model import PATCH, load_weights
from testbed.vlm.text import CHAT_TEMPLATE, IMAGE_TEXT


def processor() -> LlavaProcessor:
    """Pictures of any size as 144 x 144 of -1 to 1, and texts with 81 image tokens in the place of one."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        pictures, AutoTokenizer.from_pretrained(MODEL), patch_size=PATCH, vision_feature_select_strategy="default",
        # The vision tower's class token, which that strategy takes away.
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE, image_token=IMAGE_TEXT,
    )  # fmt: skip


def export(weights: Path, folder: Path) -> LlavaForConditionalGeneration:
    """Write the folder.

    Args:
        weights: of `testbed.vlm.train`, or the ``model.safetensors`` of such a folder.
        folder: made if it isn't there.

    Raises:
        ValueError: the file holds no weights of this model.
    """
    model = load_weights(weights, Tokenizer.from_file(str(MODEL / "tokenizer.json")), torch.bfloat16)
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=CAPTION_TOKENS, bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    _name_general_classes(folder)
    # The library writes it for its owner alone.
    os.chmod(folder / "model.safetensors", 0o644)
    return model


def _name_general_classes(folder: Path) -> None:
    """Names of classes that every version of transformers knows and turns into the one that can run."""
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    settings["image_processor"]["image_processor_type"] = "CLIPImageProcessor"
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings = {
        name: value for name, value in settings.items() if name not in ("backend", "is_local", "local_files_only")
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, default=MODEL)
    given = parser.parse_args()
    model = export(given.weights, given.out)
    print(
        f"{model.num_parameters()} parameters, {(given.out / 'model.safetensors').stat().st_size} bytes in {given.out}"
    )


if __name__ == "__main__":
    main()
