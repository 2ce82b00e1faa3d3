"""The prompt texts of the retrieval tasks, in one place.

They follow RULER's and the passkey papers' tasks in structure, with our own wording; the needle line and the
``VAR`` lines are RULER's, because its scorer and its comparisons rest on them. The shipped testbed model is
trained on exactly these strings, so a change here means training it again and raising the tasks' versions.

Every prompt is ``intro + context + question + answer_prefix`` and the model writes what follows the prefix,
starting with a space.
"""

NEEDLE = "One of the special magic {type} for {key} is: {value}."
NIAH_INTRO = "Some special magic {type} are hidden in the text below. Remember them, a question follows.\n"
NIAH_QUESTION = "\nWhich special magic {type} for {query} does the text mention?"
NIAH_ANSWER_ONE = " The special magic {type} for {query} is:"
NIAH_ANSWER_MANY = " The special magic {type} for {query} are:"

PASSKEY_INTRO = "A pass key is hidden in the text below. Find it and remember it.\n"
PASSKEY_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY_LINE = "The pass key is {value}. Remember it. {value} is the pass key."
PASSKEY_QUESTION = "\nWhat is the pass key?"
PASSKEY_ANSWER = " The pass key is"

KEY_VALUE_INTRO = "Below is a table of keys and values.\n"
KEY_VALUE_LINE = "{key}: {value}"
KEY_VALUE_QUESTION = "\nWhich value belongs to the key {key}?"
KEY_VALUE_ANSWER = " {key}:"

TRACKING_INTRO = "Follow the chain of variable assignments hidden in the text below.\n"
TRACKING_FIRST = "VAR {name} = {value}"
TRACKING_HOP = "VAR {name} = VAR {source} "
TRACKING_QUESTION = "\nWhich variables hold the value {value}?"
TRACKING_ANSWER = " The {count} variables that hold the value {value} are:"

COMMON_WORDS_INTRO = "Below is a numbered list of words. Some words appear more often than the others.\n"
COMMON_WORDS_QUESTION = "\nWhich {count} words are the most common in the list?"
COMMON_WORDS_ANSWER = " The {count} most common words are:"

FREQUENT_WORDS_INTRO = "Below is a coded text. Track how often each coded word appears and ignore the dots '...'.\n"
FREQUENT_WORDS_QUESTION = "\nWhich three coded words are the most frequent?"
FREQUENT_WORDS_ANSWER = " The three most frequent coded words are:"


def join_query(keys: list[str]) -> str:
    """``a``, ``a and b``, ``a, b, and c``: how several keys stand in a question."""
    if len(keys) == 1:
        return keys[0]
    if len(keys) == 2:
        return f"{keys[0]} and {keys[1]}"
    return ", ".join(keys[:-1]) + ", and " + keys[-1]
