"""Tokenise for tools/bench.py meter, in a virtual environment that has mistral-common: text on
standard input, {"version", "ids", "table": [base64 of an id's bytes]} on standard output.

tekken, of 131,072 entries, comes with that package: nothing is fetched.
"""

import base64
import importlib.metadata
import json
import pathlib
import sys

import mistral_common
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

FILE = pathlib.Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"


def main():
    """Read, tokenise, write."""
    tokenizer = Tekkenizer.from_file(FILE)
    ids = tokenizer.encode(sys.stdin.buffer.read().decode("utf-8"), bos=False, eos=False)
    special = tokenizer.num_special_tokens  # the first ids; they have no bytes
    table = [tokenizer.id_to_byte_piece(n) for n in range(special, tokenizer.n_words)]
    table = [b""] * special + table
    version = importlib.metadata.version("mistral-common")
    texts = [base64.b64encode(item).decode() for item in table]
    json.dump({"version": version, "ids": ids, "table": texts}, sys.stdout)


if __name__ == "__main__":
    main()
