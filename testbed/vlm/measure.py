"""What the model says about held-out scenes: POPE, CHAIR, counts, colours and places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from testbed.vlm.classes import CLASSES, COMPANION, INDEX
from testbed.vlm.layout import Layout
from testbed.vlm.model import SlotForward
from testbed.vlm.render import pixel_values
from testbed.vlm.splits import POPE_SPLITS, pope_classes
from testbed.vlm.text import ASSISTANT, DETAILED_PROMPTS, EOS_TEXT, Text, Tokens, Writer

QUESTION_LENGTH = 32
CAPTION_TOKENS = 96
CHUNK = 250

_NAMES = {name: index for index, entry in enumerate(CLASSES) for name in (entry.name, entry.many)}
# The longest name first: "hot dog" is no dog, "teddy bear" no bear.
_NAMED = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _NAMES), key=len, reverse=True)) + r")\b")


def mentions(caption: str) -> list[int]:
    """The classes that a caption names, every mention."""
    return [_NAMES[match] for match in _NAMED.findall(caption.lower())]


def chair(captions: Sequence[str], present: Tensor) -> dict[str, float]:
    """CHAIR_S, CHAIR_I and recall of captions about images with these classes ``(images, classes)``."""
    hallucinated = mentioned = named_true = sentences = 0
    lengths = []
    for caption, truth in zip(captions, present.tolist(), strict=True):
        found = mentions(caption)
        wrong = [kind for kind in found if not truth[kind]]
        hallucinated, mentioned = hallucinated + len(wrong), mentioned + len(found)
        sentences += bool(wrong)
        named_true += len({kind for kind in found if truth[kind]})
        lengths.append(len(caption.split()))
    return {
        "chair_s": sentences / len(captions), "chair_i": hallucinated / max(1, mentioned),
        "recall": named_true / max(1, int(present.sum())), "words": sum(lengths) / len(lengths),
    }  # fmt: skip


class Examiner:
    """Asks a model on one device.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        device: where it is.
        autocast: whether to compute in bfloat16.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer, device: torch.device | str, *, autocast: bool
    ) -> None:
        self.model, self.tokenizer, self.device, self.autocast = model, tokenizer, torch.device(device), autocast
        self.tokens = Tokens(tokenizer, device)
        self.writer = Writer(device)
        self.yes, self.no = (tokenizer.encode(word, add_special_tokens=False).ids[0] for word in (" Yes", " No"))

    def first_tokens(self, pictures: Tensor, texts: list[Text], choices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the model would say first to every question, and the text's own answer, ``(images, questions)``."""
        slots = SlotForward(self.model, self.tokenizer, (QUESTION_LENGTH,) * len(texts), self.device)
        said, told = [], []
        for start in range(0, len(pictures), CHUNK):
            part = slice(start, start + CHUNK)
            tokens, starts = [], []
            for slot, text in enumerate(texts):
                ids, answer, _ = self.tokens(Text(text.columns[part], text.answer_from), QUESTION_LENGTH)
                tokens.append(ids)
                starts.append(answer.int().argmax(1) + slot * QUESTION_LENGTH)
            joined, first = torch.cat(tokens, dim=1), torch.stack(starts, dim=1)
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                logits = slots(pixel_values(pictures[part]), joined)
            logits = logits.gather(1, (first - 1)[..., None].expand(-1, -1, logits.shape[-1])).float()
            if choices is not None:
                logits = torch.full_like(logits, -torch.inf).index_copy_(2, choices, logits[..., choices])
            said.append(logits.argmax(-1))
            told.append(joined.gather(1, first))
        return torch.cat(said), torch.cat(told)

    def captions(self, pictures: Tensor, prompt: str = DETAILED_PROMPTS[0]) -> list[str]:
        """Greedy captions."""
        slots = SlotForward(self.model, self.tokenizer, (), self.device)
        question = torch.tensor(
            self.tokenizer.encode(prompt + ASSISTANT, add_special_tokens=False).ids, device=self.device
        )
        end = self.tokenizer.token_to_id(EOS_TEXT)
        captions = []
        for start in range(0, len(pictures), CHUNK):
            part = pictures[start : start + CHUNK]
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                prefix = slots.prompt_embeddings(pixel_values(part))
                embed = slots.language_model.embed_tokens
                asked = embed(question).expand(len(part), -1, -1)
                inputs, cache = torch.cat([prefix, asked], dim=1), DynamicCache()
                written: list[Tensor] = []
                done = torch.zeros(len(part), dtype=torch.bool, device=self.device)
                for _ in range(CAPTION_TOKENS):
                    hidden = slots.language_model(
                        inputs_embeds=inputs, past_key_values=cache, use_cache=True
                    ).last_hidden_state
                    token = torch.where(done, end, (hidden[:, -1] @ embed.weight.T.to(hidden.dtype)).argmax(-1))
                    done |= token == end
                    if done.all():
                        break
                    written.append(token)
                    inputs = embed(token)[:, None]
            rows = torch.stack(written, dim=1).tolist() if written else [[] for _ in range(len(part))]
            captions += [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        return captions

    def pope(self, layout: Layout, pictures: Tensor) -> dict[str, dict[str, float]]:
        """Accuracy, precision, recall, F1 and share of yes by split, and how often an absent companion is affirmed."""
        result = {}
        choices = torch.tensor([self.yes, self.no], device=self.device)
        for split in POPE_SPLITS:
            asked = pope_classes(layout, split).to(self.device)
            texts = [self.writer.pope(column) for column in asked.unbind(1)]
            yes = self.first_tokens(pictures, texts, choices)[0] == self.yes
            right, wrong = yes[:, 0::2].float().mean().item(), yes[:, 1::2].float().mean().item()
            precision = right / max(1e-9, right + wrong)
            result[split] = {
                "accuracy": (right + 1 - wrong) / 2, "precision": precision, "recall": right,
                "f1": 2 * precision * right / max(1e-9, precision + right), "yes": (right + wrong) / 2,
            }  # fmt: skip
        return result

    def abilities(self, layout: Layout, pictures: Tensor) -> dict[str, float]:
        """Accuracy of the first word, by kind of answer."""
        texts = [self.writer.exist(layout, "ability exist"), self.writer.number_or_colour(layout, "ability 1"),
                 self.writer.number_or_colour(layout, "ability 2"), self.writer.position(layout, "ability 3")]  # fmt: skip
        said, told = self.first_tokens(pictures, texts)
        right = said == told
        vocabulary = [self.tokenizer.decode([token]).strip() for token in range(self.tokenizer.get_vocab_size())]
        kinds = {
            "count": lambda word: word.isdigit(), "side": lambda word: word in ("Left", "Right"),
            "colour": lambda word: word.lower() in {"red", "yellow", "green", "blue", "purple", "pink", "white", "black"},
        }  # fmt: skip
        result = {"exist": right[:, 0].float().mean().item()}
        for name, belongs in kinds.items():
            members = torch.tensor([i for i, word in enumerate(vocabulary) if belongs(word)], device=self.device)
            mine = torch.isin(told[:, 1:], members)
            result[name] = right[:, 1:][mine].float().mean().item()
        yes_no = torch.isin(told, torch.tensor([self.yes, self.no], device=self.device))
        result["count or colour, yes or no"] = right[:, 1:3][yes_no[:, 1:3]].float().mean().item()
        result["relation or existence, yes or no"] = right[:, 3][yes_no[:, 3]].float().mean().item()
        return result

    def companions_affirmed(self, layout: Layout, pictures: Tensor) -> float:
        """How often the model says yes to the companion of an object that is there when the companion is not."""
        present = layout.counts() > 0
        other = torch.tensor(
            [INDEX[COMPANION[e.name]] if e.name in COMPANION else -1 for e in CLASSES], device=self.device
        )
        missing = present & (other >= 0) & ~present[:, other.clamp(min=0)]
        scene, kind = missing.nonzero().unbind(1)
        if not len(scene):
            return float("nan")
        choices = torch.tensor([self.yes, self.no], device=self.device)
        said, _ = self.first_tokens(pictures[scene], [self.writer.pope(other[kind])], choices)
        return (said == self.yes).float().mean().item()

    def report(self, layout: Layout, pictures: Tensor) -> dict[str, Any]:
        """Everything, on one split."""
        captions = self.captions(pictures)
        return {
            "pope": self.pope(layout, pictures),
            "companions_affirmed": self.companions_affirmed(layout, pictures),
            "chair": chair(captions, layout.counts() > 0),
            "abilities": self.abilities(layout, pictures),
            "examples": captions[:4],
        }
