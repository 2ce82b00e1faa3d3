"""Readers that answer a prompt by looking the answer up in its text: what a perfect model would write."""

from __future__ import annotations

import re
from collections import Counter

from attn_eval.rows import Row

VALUE = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")


def oracle(row: Row) -> str:
    """The answer to a row, from its prompt alone; the row's outputs are not looked at."""
    readers = {
        "passkey": _passkey,
        "key_value": _key_value,
        "variable_tracking": _variable_tracking,
        "common_words": _common_words,
        "frequent_words": _frequent_words,
    }
    return readers.get(row.task, _needle)(row.input)


def _needle(prompt: str) -> str:
    context, question = prompt.rsplit("\n", 1)
    asked = re.search(r"Which special magic \w+ for (.+) does the text mention", question)
    assert asked
    keys = re.split(r", and |, | and ", asked.group(1))
    return " ".join(value for key, value in VALUE.findall(context) if key in keys)


def _passkey(prompt: str) -> str:
    found = re.search(r"The pass key is (\d+)\.", prompt)
    assert found
    return f" {found.group(1)}."


def _key_value(prompt: str) -> str:
    asked = re.search(r"belongs to the key (\S+)\?", prompt)
    assert asked
    return prompt.split(f"\n{asked.group(1)}: ")[1].split("\n")[0]


def _variable_tracking(prompt: str) -> str:
    last = prompt[prompt.rindex("Follow the chain") :]
    asked = re.search(r"hold the value (\d+)\?", last)
    assert asked
    held = {asked.group(1)}
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", last):
        if source in held:
            held.add(name)
    return " ".join(held)


def _common_words(prompt: str) -> str:
    last = prompt[prompt.rindex("Below is a numbered list") :]
    counts = Counter(re.findall(r"\d+\. (\S+)", last.rsplit("\n", 1)[0]))
    return ", ".join(word for word, _ in counts.most_common(10))


def _frequent_words(prompt: str) -> str:
    words = prompt.split("\n")[1].split(" ")
    counts = Counter(word for word in words if word != "...")
    return " ".join(word for word, _ in counts.most_common(3))
