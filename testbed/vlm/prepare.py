"""What is made once: the sheet of glyphs, rendered from the font, and the tokenizer.

python -m testbed.vlm.prepare glyphs --font NotoColorEmoji.ttf   # Debian fonts-noto-color-emoji
python -m testbed.vlm.prepare tokenizer
"""

from __future__ import annotations

import argparse
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from testbed.vlm import MODEL
from testbed.vlm.classes import CLASSES, ObjectClass
from testbed.vlm.glyphs import GLYPH, SHEET, SHEET_COLUMNS
from testbed.vlm.text import CHAT_TEMPLATE, EOS_TEXT, IMAGE_TEXT, phrase_texts, training_texts

FONT_SIZE = 109
VOCABULARY = 1024
PAD, BOS = "<pad>", "<s>"


def write_sheet(font_file: str) -> None:
    """Every class's glyph, cropped to what is drawn and scaled to one height or width, side by side in one PNG."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(font_file, FONT_SIZE)

    def glyph(entry: ObjectClass) -> Image.Image:
        drawn = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(drawn).text((0, 0), entry.emoji, font=font, embedded_color=True)

        def part(box: tuple[int, int, int, int]) -> tuple[int, ...]:
            return tuple(round(share * side / 100) for share, side in zip(box, drawn.size * 2, strict=True))

        if entry.erase != (0, 0, 0, 0):
            drawn.paste((0, 0, 0, 0), part(entry.erase))
        drawn = drawn.crop(part(entry.keep))
        box = drawn.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
        if box is None:
            raise ValueError(f"{font_file} draws nothing for {entry.name!r}: give Noto Color Emoji")
        drawn = drawn.crop(box)
        scale = GLYPH / max(drawn.size)
        drawn = drawn.resize([max(1, round(side * scale)) for side in drawn.size], Image.Resampling.BOX)
        cell = Image.new("RGBA", (GLYPH, GLYPH))
        cell.paste(drawn, ((GLYPH - drawn.width) // 2, (GLYPH - drawn.height) // 2))
        return cell

    rows = -(-len(CLASSES) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * GLYPH, rows * GLYPH))
    for index, entry in enumerate(CLASSES):
        sheet.paste(glyph(entry), (index % SHEET_COLUMNS * GLYPH, index // SHEET_COLUMNS * GLYPH))
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(SHEET, optimize=True)
    print(f"{len(CLASSES)} glyphs, {SHEET.stat().st_size} bytes")


def write_tokenizer() -> None:
    """A byte-level BPE trained on the texts of the scenes, saved with the model; it can spell any other text, too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, BOS, EOS_TEXT, IMAGE_TEXT)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS_TEXT, pad_token=PAD, model_max_length=512,
        padding_side="left", clean_up_tokenization_spaces=False, extra_special_tokens={"image_token": IMAGE_TEXT},
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(MODEL)
    # The name of the class that transformers 4 and 5 both know.
    settings_file = MODEL / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    words = {word for text in phrase_texts() for word in text.split()}
    longest = max(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in phrase_texts())
    print(f"{tokenizer.get_vocab_size()} tokens, {len(words)} words, the longest phrase has {longest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("glyphs", "tokenizer"))
    parser.add_argument("--font", help="the font's file, for glyphs")
    arguments = parser.parse_args()
    if arguments.step == "glyphs":
        if arguments.font is None:
            parser.error("glyphs needs --font, the file NotoColorEmoji.ttf of Debian's fonts-noto-color-emoji")
        write_sheet(arguments.font)
    else:
        write_tokenizer()


if __name__ == "__main__":
    main()
