"""Messages for the fuzzer: good ones of every form of the protocol, and whatever is nearly one.

All of it is drawn from a seeded random.Random ("chance"), so that a seed says everything. A message
is a tree: an object is a list of [name, value] pairs, so that a name can come twice, and Raw is
text that goes in as it is.
"""

import json

import fuzz_oracle as oracle


class Raw(str):
    """Text that is written without quotes."""


class Pairs(list):
    """An object: [[name, value], ...]."""


EDGES = (0, 1, -1, 2, 255, 256, 4095, 4096, 4097, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32)
EDGES += ((1 << 53) - 1, 1 << 53, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63))
NUMBERS = """NaN Infinity -Infinity 1e400 -1e400 1e308 1e-400 0.1 -0 -0.0 1.0 1e0 01 +1 1. .5 0x1
1_0 1e 1e+ --1 - 1,5 \u0661 \uff11""".split()
NUMBERS += ["1" * oracle.DIGITS, "1" * (oracle.DIGITS + 1), "-" + "1" * 5000, "0." + "1" * 5000]
LITERALS = 'null true false nul True None undefined \'a\' [] {} [null] {"a":1} "" /**/1 1//'.split()
LETTERS = [r'"\ud800"', r'"\udfff"', r'"\ud83d\ude00"', r'"\ude00\ud83d"', r'"\u0000"', '"\0"']
LETTERS += [
    '"\n"',
    '"\t"',
    r'"\x41"',
    r'"\u004"',
    '"\u2028"',
    '"\ufeff"',
    r'"\/"',
    '"\\"',
    '"\x7f"',
]
WICKED = [  # what other parsers have fallen for
    "%s%s%s%n%n%x",
    "{0.__class__.__mro__}",
    "${jndi:ldap://127.0.0.1/a}",
    "'; DROP TABLE users; --",
    "' OR '1'='1",
    "../../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "/dev/zero",
    "file:///etc/shadow",
    "$(reboot)",
    "`id`",
    "; cat /etc/passwd |",
    "{{7*7}}{% for x in ().__class__.__base__.__subclasses__() %}",
    "<script>alert(1)</script>",
    "<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>",
    "\r\nSet-Cookie: a=b",
    "\x1b[2J\x1b]0;a\x07",
    "\u202e\u200b\u0301" * 3,
    "\ufdfa" * 18,
    "Z\u0351\u036b\u0343" * 20,
    "\U0010ffff\U0001f468\u200d\U0001f469",
    "<|im_start|>system",
]
NAMES = ["__proto__", "constructor", "__class__", "prototype", "", " ", "\0", "prompt\0", "Prompt"]
NAMES += ["prompt ", "pr\u043empt", "more", "a" * 300, "error", "$ref", "key", "token", "lease"]
NAMES += ["status", "debug", "is_admin", "role", "model", "score", "temperature?", "seed?"]
WORDS = (b"null", b"true", b"{}", b"[]", b'"', b"\\u0000", b"-1", b"1e400", b",", b"}", b"{", b":")
BAD_UTF8 = (
    b"\xff",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b"\x80",
    b"\xfe",
)
SPACES = ("", "", "", " ", "\n", "\t", "\r\n ", "\x0b", "\xa0", "\u2003", "\x00", "\x0c")


# ---------------------------------------------------------------- good values


def good(chance, form, edge=0.2):
    """A good message of a form, as a tree. edge: the share of values that lie on a bound."""
    pairs = Pairs()
    for name, kind in oracle.FIELDS[form].items():
        if not name.endswith("?") or chance.random() < 0.3:
            pairs.append([name.rstrip("?"), good_value(chance, kind, edge)])
    if chance.random() < 0.2:
        chance.shuffle(pairs)
    return pairs


def good_value(chance, kind, edge=0.2):
    """A value of a kind (words of FORMS)."""
    name, *rest = kind
    on_edge = chance.random() < edge
    if name == "int":
        low, high = int(rest[0]), int(rest[1])
        return chance.choice((low, high)) if on_edge else chance.randint(low, min(high, low + 5000))
    if name == "number":
        low, high = float(rest[0]), float(rest[1])
        return chance.choice((low, high)) if on_edge else round(chance.uniform(low, high), 6)
    if name == "bool":
        return chance.random() < 0.5
    if name == "true":
        return True
    if name == "form":
        return good(chance, rest[0], edge)
    if name == "list":
        low, high = int(rest[0]), min(int(rest[1]), 40)
        count = chance.choice((low, high)) if on_edge else chance.randint(low, min(high, low + 3))
        return [good_value(chance, rest[2:], edge / 4) for _ in range(count)]
    if name == "one":
        return chance.choice(rest)
    if name == "text":
        low, high = int(rest[0]), min(int(rest[1]), 300)
        if on_edge:
            return "a" * chance.choice((low, high))
        text = chance.choice(WICKED) if chance.random() < 0.3 else "The quick brown fox "
        return (text * (1 + low // len(text)))[: max(high, low)]
    if name == "name":
        return chance.choice(("demo", "a", "_-.", "A" * 128))
    if name == "lease" and on_edge:
        return ""
    size = chance.randrange(40) if name == "bytes" else int(rest[0] if rest else 16)
    return chance.randbytes(size).hex()


# ---------------------------------------------------------------- wrong values


def wrong_value(chance, kind):
    """A value that is nearly of a kind, or of another one; now and then it is good after all."""
    name, *rest = kind or ("text", "0", "9")
    at_bound = chance.random()
    if name == "int" and at_bound < 0.5:
        low, high = int(rest[0]), int(rest[1])
        return chance.choice((low - 1, high + 1, low, high, float(low), -low, str(low), True))
    if name == "number" and at_bound < 0.4:
        low, high = float(rest[0]), float(rest[1])
        return chance.choice((low - 1e-6, high + 1e-6, low, high, -high, True, False))
    if name == "text" and at_bound < 0.4 and int(rest[1]) <= 4096:
        return "a" * chance.choice((max(0, int(rest[0]) - 1), int(rest[1]) + 1, int(rest[1])))
    if name == "list" and at_bound < 0.4:
        count = chance.choice((max(0, int(rest[0]) - 1), min(int(rest[1]) + 1, 1100), 0))
        return [good_value(chance, rest[2:], 0)] * count
    if name in ("hex", "bytes", "lease") and at_bound < 0.7:
        text = chance.randbytes(int(rest[0]) if rest else 16).hex()
        others = [text[1:], text + "0", text + "00", text.upper(), text[:-1] + "g", text + "\n"]
        others += [" " + text[1:], text[:-1] + "\u0661", text[:-1] + "\uff11", "0x" + text[2:]]
        return chance.choice(others)
    if name == "one" and at_bound < 0.4:
        word = chance.choice(rest)
        return chance.choice((word.upper(), word + " ", word + "\0", "", " ".join(rest), [word]))
    if name == "name" and at_bound < 0.5:
        return chance.choice((".a", "", "a/b", "a\n", "\u00e9", "A" * 129, "..", "a b", "-"))
    if name in ("true", "bool") and at_bound < 0.5:
        return chance.choice((1, 0, "true", None, False, 1.0))
    return anything(chance)


def anything(chance):
    """A value of no kind in particular."""
    what = chance.randrange(9)
    if what == 0:
        return chance.choice(EDGES)
    if what == 1:
        return Raw(chance.choice(NUMBERS))
    if what == 2:
        return Raw(chance.choice(LITERALS))
    if what == 3:
        return Raw(chance.choice(LETTERS))
    if what == 4:
        return chance.choice(WICKED)
    if what == 5:
        depth = chance.choice((1, 2, 13, 14, 15, 16, 17, 40, 2000))
        opening, closing = chance.choice((("[", "]"), ('{"a":', "}")))
        return Raw(opening * depth + "1" + closing * chance.choice((depth, depth, depth, 0)))
    if what == 6:
        return good(chance, chance.choice(list(oracle.FORMS)))
    if what == 7:
        return "a" * chance.choice((0, 1, 15, 16, 64, 256, 257, 5000))
    return chance.choice((None, True, False, [], Pairs(), [[]], 0.5, -1, 1e300))


def mutate_tree(chance, tree, form):
    """Change one thing in a message of a form, in place."""
    holders = [(tree, form)]
    for pairs, inner in holders:
        for name, value in pairs:
            kind = kind_of(inner, name)
            if isinstance(value, Pairs) and kind and kind[0] == "form":
                holders.append((value, kind[1]))
            elif isinstance(value, list) and not isinstance(value, Pairs) and kind:
                forms = [item for item in value if isinstance(item, Pairs)]
                if kind[0] == "list" and kind[3] == "form":
                    holders += [(item, kind[4]) for item in forms[:3]]
    pairs, inner = chance.choice(holders)
    what = chance.randrange(8)
    at = chance.randrange(len(pairs)) if pairs else None
    if what == 0 and pairs:
        del pairs[at]
    elif what == 1 and pairs:
        value = pairs[at][1] if chance.random() < 0.5 else anything(chance)
        pairs.insert(chance.randrange(len(pairs) + 1), [pairs[at][0], value])
    elif what == 2:
        others = [name.rstrip("?") for other in oracle.FIELDS.values() for name in other]
        name = chance.choice(NAMES if chance.random() < 0.5 else others)
        pairs.insert(chance.randrange(len(pairs) + 1), [name, anything(chance)])
    elif what == 3 and pairs:
        name = pairs[at][0]
        pairs[at][0] = chance.choice(
            (name.upper(), name + " ", name[1:], name + "\0", "\ufeff" + name)
        )
    elif pairs:
        pairs[at][1] = wrong_value(chance, kind_of(inner, pairs[at][0]))


def kind_of(form, name):
    """The kind of a field, or None."""
    fields = oracle.FIELDS.get(form, {})
    return fields.get(name) or fields.get(f"{name}?")


# ---------------------------------------------------------------- text


def write(tree, chance=None):
    """A tree as JSON text. With chance: with spaces and escapes where JSON has a choice."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs | dict):
        pairs = tree.items() if isinstance(tree, dict) else tree
        items = [f"{write(name, chance)}{gap(chance)}:{write(v, chance)}" for name, v in pairs]
        return "{" + gap(chance) + f"{gap(chance)},".join(items) + "}"
    if isinstance(tree, list):
        return "[" + f",{gap(chance)}".join(write(item, chance) for item in tree) + "]"
    if isinstance(tree, str):
        text = json.dumps(tree, ensure_ascii=not (chance and chance.random() < 0.3))
        if chance and tree and chance.random() < 0.1:
            text = f'"\\u{ord(tree[0]):04x}{text[2:]}' if tree[0].isalnum() else text
        return text
    return json.dumps(tree)


def gap(chance):
    """White space, or what some take for it."""
    return chance.choice(SPACES[:7]) if chance and chance.random() < 0.2 else ""


def mutate_text(chance, text):
    """Change a message's text; bytes."""
    at = chance.randrange(len(text) + 1)
    what = chance.randrange(12)
    if what == 0:
        return chance.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"\0")) + text.encode()
    if what == 1:
        return text.encode(
            chance.choice(("utf-16", "utf-16-le", "utf-32", "utf-7", "latin-1")), "replace"
        )
    if what == 2:
        more = (" ", "\n", "{}", ",", "\0", "}", "//", "\x1a", text)
        return (text + chance.choice(more)).encode()
    if what == 3:
        return text[:at].encode()
    if what == 4:
        return text.replace(
            chance.choice('"{:,}'), chance.choice(("'", "", ",,", "[", " ")), 1
        ).encode()
    if what == 5:
        return (text[:at] + chance.choice(SPACES) + text[at:]).encode()
    if what == 6:
        bad = text.encode()
        at = min(at, len(bad))
        return bad[:at] + chance.choice(BAD_UTF8) + bad[at:]
    if what == 7:
        return chance.choice(
            (f"[{text}]", f'{{"a":{text}}}', f'"{text}"', f"{text}{text}")
        ).encode()
    if what == 8:
        return chance.choice(
            (b"", b"{}", b"[]", b"null", b"{", b'""', b"0", b"\0" * 9, b"[" * 99_999)
        )
    if what == 9:
        return (text[:-1] + ',"":0' * chance.choice((0, 1, 2)) + ",}").encode()
    return mutate_bytes(chance, text.encode())


def mutate_bytes(chance, data):
    """Flip, drop, repeat, insert or replace some bytes."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 1, 2, 8, 64)))
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.choice((1, 3, 40)))
        else:
            data[at:end] = chance.choice(WORDS)
    return bytes(data)


def message(chance, form, tree=None, wrong=0.75):
    """Bytes of a message of a form: good, or (with probability `wrong`) changed in a place or two.

    tree: a good message to begin with.
    """
    tree = good(chance, form) if tree is None else tree
    if chance.random() >= wrong:
        return write(tree, chance if chance.random() < 0.3 else None).encode()
    layers = chance.choice(("tree", "tree", "tree", "text", "both"))
    for _ in range(chance.choice((1, 1, 1, 2)) if layers != "text" else 0):
        mutate_tree(chance, tree, form)
    text = write(tree, chance if chance.random() < 0.2 else None)
    return mutate_text(chance, text) if layers != "tree" else text.encode("utf-8", "surrogatepass")
