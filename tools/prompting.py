"""What turns requests into token ids, worked out from a tokenizer's files on the owner's station.

seal.py puts the result into the container as prompts.json; the engine's Prompter only reads it.
Text from outside must never become a special token. So an added token has two private characters:
its mask stands for its text inside user text while the template is rendered; its name is all that
the rewritten tokenizer knows it by, and is written only where the template wrote its text. Added
white space is left alone: it is text, not a mark.
"""

import json
import re

PRIVATE = 0xF8000  # private characters from here on stand for added tokens, two for each
MARKS_LIMIT = (0x110000 - PRIVATE) // 2  # as far as there are characters


def make_prompts(tokenizer, config, template):
    """prompts.json of a tokenizer, as an object.

    tokenizer: the text of tokenizer.json, which the tokenizers package has read. config:
    tokenizer_config.json, with special_tokens_map.json over it. template: chat_template.jinja, ""
    without one. Raises ValueError, whose text names the file, for what an engine can't do.

    Its fields: tokenizer, rewritten: each mark has its name for a text. masks, names: {text of a
    mark: private character}. pattern: a regular expression of the marks' texts. ids: [[id in the
    rewritten tokenizer, the model's id]] of added tokens. special: ids that plain text must not
    become. prefix: ids that begin every text. variables: what the template gets beside messages
    and date. template: "" if there is none.
    """
    from tokenizers import Tokenizer

    fields = json.loads(tokenizer)
    added = fields.get("added_tokens") or []
    marks = [token for token in added if token["special"] or not token["content"].isspace()]
    if len(marks) > MARKS_LIMIT:
        raise ValueError(f"tokenizer.json: more than {MARKS_LIMIT:,} added tokens")
    marks.sort(key=lambda token: len(token["content"]), reverse=True)  # the longest match wins
    texts = [token["content"] for token in marks]
    masks = {text: chr(PRIVATE + 2 * n) for n, text in enumerate(texts)}
    names = {text: chr(PRIVATE + 2 * n + 1) for n, text in enumerate(texts)}
    for token in marks:
        token["content"] = names[token["content"]]
    rewritten = Tokenizer.from_str(json.dumps(fields))
    ids = {rewritten.token_to_id(token["content"]): token["id"] for token in added}
    own = rewritten.get_vocab(with_added_tokens=False)
    new = {token["content"] for token in added} - own.keys()
    if not set(map(rewritten.token_to_id, new)).isdisjoint(own.values()):
        raise ValueError("tokenizer.json: its vocabulary has holes where added tokens would go")
    unknown = fields["model"].get("unk_id", own.get(fields["model"].get("unk_token")))
    special = {token["id"] for token in added if token["special"]} - ids.keys() - {unknown}
    return {
        "tokenizer": fields,
        "masks": masks,
        "names": names,
        "pattern": "|".join(map(re.escape, texts)) or "(?!)",
        "ids": sorted(ids.items()),
        "special": sorted(special),
        "prefix": prefix_ids(Tokenizer.from_str(tokenizer)),
        "variables": template_variables(config),
        "template": chat_template(config, template),
    }


def prefix_ids(tokenizer):
    """The ids that a tokenizer puts before every text; what it puts at the end is left out."""
    whole, alone = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    return whole[: whole.index(alone[0])] if alone else []


def template_variables(config):
    """The template's variables: named tokens' texts, and what is always the same. ValueError."""
    variables = {"add_generation_prompt": True, "tools": None, "documents": None}
    for name, token in config.items():
        if name.endswith("_token") and token:
            if isinstance(token, dict) and "content" not in token:
                raise ValueError(f"tokenizer_config.json: its {name} has no content")
            variables[name] = token["content"] if isinstance(token, dict) else token
    return variables


def chat_template(config, template):
    """The chat template of a file of its own, else of tokenizer_config.json. Raises ValueError."""
    template = template or config.get("chat_template") or ""
    if not isinstance(template, str):
        raise ValueError("tokenizer_config.json: its chat_template is not one text")
    return template
