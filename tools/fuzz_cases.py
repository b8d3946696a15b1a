"""The fuzzer's named cases: each a function of a seeded random.Random that gives episodes, lists of
actions as fuzz_gate.py plays them. First what everybody tries; then streams that have no end.
"""

import struct

import fuzz_gate as gate
import fuzz_messages as messages
import fuzz_oracle as oracle
import fuzz_targets as targets
from fuzz_gate import as_data

REQUEST = '{"prompt":"The","max_new_tokens":3}'
HELD = f'{{"prompt":"{gate.HOLD}","max_new_tokens":60}}'
SCORE = '{"prompt":"The","seed":1,"score":{"ids":%s,"tolerance":0.5}}'
CANCEL, STATUS = '{"cancel":true}', '{"status":true}'
GOOD = {"challenge": gate.CHALLENGE % "user", **gate.TOKENS, "request": REQUEST, "command": STATUS}
BATCH = 20  # messages before their replies are read
PARSED = 40  # inputs of a parser in an episode
CASES, STREAMS = {}, {}  # name: function


def case(function):
    """A named case, by its function's name."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


# ---------------------------------------------------------------- how cases are built


def do(what, peer=0, **more):
    """An action."""
    return {"do": what, "peer": peer, **more}


def bare(data):
    """A body as an action's data."""
    return as_data(data) if isinstance(data, bytes) else data


def strangers(bodies, **more):
    """Each body as the first frame of a peer of its own."""
    for at in range(0, len(bodies), 10):
        yield [
            action
            for number, body in enumerate(bodies[at : at + 10])
            for action in (do("open", number), do("frame", number, data=bare(body), **more))
        ]


def offers(role, bodies):
    """Each body as the token of a peer of its own."""
    for at in range(0, len(bodies), 10):
        yield [
            action
            for number, body in enumerate(bodies[at : at + 10])
            for action in (do("greet", number, role=role), do("say", number, data=bare(body)))
        ]


def session(role, *actions):
    """One peer that has proved itself, then these actions."""
    return [do("greet", role=role), do("token"), do("read"), *actions]


def talk(role, bodies):
    """Each body as a message of one session, some at a time."""
    for at in range(0, len(bodies), 100):
        actions = []
        for number, body in enumerate(bodies[at : at + 100], 1):
            actions += [do("say", data=bare(body))] + [do("read")] * (number % BATCH == 0)
        yield session(role, *actions)


def everywhere(bodies):
    """Each body as a challenge, as either token, as a request and as a command."""
    bodies = list(bodies)
    short = [body for body in bodies if len(body) < 4000]
    yield from strangers(short)
    for role in gate.ROLES:
        yield from offers(role, short)
        yield from talk(role, bodies)


def at_each_step(change):
    """change(text) -> bodies, of the good message of each step."""
    yield from strangers(change(GOOD["challenge"]))
    for role, request in (("user", "request"), ("owner", "command")):
        yield from offers(role, change(GOOD[role]))
        yield from talk(role, change(GOOD[request]))
    yield from offers("owner", change(gate.UNLOCK))


def fields_of(text):
    """The fields of a flat or nested good message, as [(text of the pair, name)]."""
    pairs, depth, start = [], 0, 1
    for at, letter in enumerate(text):
        depth += letter in "{["
        depth -= letter in "}]"
        if (letter == "," and depth == 1) or at == len(text) - 1:
            pair = text[start:at]
            pairs.append((pair, pair.partition(":")[0].strip('"')))
            start = at + 1
    return pairs


# ---------------------------------------------------------------- what everybody tries


@case
def empty_message(chance):
    """A frame or a record of nothing."""
    yield from everywhere(["", "{}", " ", "\0"])
    yield session("user", do("record", data=""))
    yield session("owner", do("record", data="", way="bare"))


@case
def oversized_length(chance):
    """A length beyond the step's limit, by one, by much; with nothing, or with all of it behind."""
    for length in (4097, 1 << 20, 1 << 31, 0xFFFFFFFF):
        yield [do("open"), do("frame", data="", length=length)]
        yield [do("greet", role="user"), do("frame", data="x", length=length)]
    for length in ((1 << 20) + 1, 0xFFFFFFFF):
        yield session("user", do("frame", data="x" * 50, length=length))
        yield session("owner", do("frame", data="", length=length))
    good = GOOD["challenge"]
    width = 4096 - len(good.replace("@SHARE@", "0" * 768).replace("@NONCE@", "0" * 64))
    yield from strangers([good[:-1] + " " * (width + more) + "}" for more in (0, 1, 2, 999)])


@case
def negative_length(chance):
    """What is -1 to others."""
    for length in (0xFFFFFFFF, 0x80000000, 0xFFFFF000):
        yield [do("open"), do("frame", data=GOOD["challenge"], length=length)]


@case
def zero_length(chance):
    """Frames of no bytes, one and many."""
    for count in (1, 2, 200):
        yield [do("open"), do("send", data={"hex": "00000000" * count})]
        yield [do("greet", role="owner"), do("send", data={"hex": "00000000" * count})]
        yield session("user", do("send", data={"hex": "00000000" * count}))


@case
def truncated_frame(chance):
    """The end comes within a frame."""
    whole = struct.pack(">I", len(GOOD["challenge"])).decode("latin-1") + GOOD["challenge"]
    for size in (1, 2, 3, 4, 5, 60, len(whole) - 1):
        for how in ("close", "half", "reset"):
            yield [do("open"), do("send", data=whole[:size]), do("leave", how=how)]
    for size in (3, 4, 5, 30):
        for role in gate.ROLES:
            yield session(role, do("frame", data="x" * size, length=60), do("leave", how="half"))


@case
def invalid_json(chance):
    """What is not JSON, or not one object."""
    texts = """{ } [ ] null true 1 "a" {"a"} {"a":} {"a":1,} {,} {"a":1}} {"a":1}{"a":1} {a:1}
    {'a':1} [{}] {"a":[1,]} {"a":01} {"a":+1} {"a":.5} {"a":1.} {"a":0x1} {"a":1e} {"a":tru} //x {}
    {"a":"\\x"} {"a":"\\u12"} {"a":"\\"} {"a":1/**/}""".split()
    yield from everywhere(texts + ['{"a":"\n"}', '{"a":"\t"}', '{"a":1} x', "\ufeff{}", "{}\0"])
    yield from at_each_step(
        lambda good: [good[:-1], good + "}", good + good, good[1:], good[:-1] + ",}"]
    )


@case
def missing_fields(chance):
    """Each field left out."""

    def without(good):
        pairs = fields_of(good)
        return [
            "{" + ",".join(p for p, _ in pairs[:n] + pairs[n + 1 :]) + "}"
            for n in range(len(pairs))
        ]

    yield from at_each_step(without)


@case
def unknown_fields(chance):
    """One field more, named as others have been fooled by."""
    yield from at_each_step(
        lambda good: [f"{good[:-1]},{messages.write(name)}:1}}" for name in messages.NAMES[:12]]
    )
    more = gate.UNLOCK.replace('"rate"', '"more":1,"rate"')
    yield from offers("owner", [more, gate.UNLOCK.replace('"verified"', '"more":1,"verified"')])


@case
def duplicate_fields(chance):
    """Each field twice, with the same value, also when one name is written with an escape."""

    def twice(good):
        pairs = fields_of(good)
        again = [good[:-1] + "," + pair + "}" for pair, _ in pairs]
        return again + [f'{good[:-1]},"\\u{ord(p[1]):04x}{p[2:]}}}' for p, _ in pairs]

    yield from at_each_step(twice)


@case
def wrong_types(chance):
    """Each field with values of other types."""

    def typed(good):
        values = ("null", "true", "0", "-1", "0.5", '""', '"a"', "[]", "{}", '["a"]', "[[]]")
        return [
            good.replace(p, f'"{n}":{value}', 1) for p, n in fields_of(good) for value in values
        ]

    yield from at_each_step(typed)


@case
def numbers(chance):
    """Numbers on a bound and beyond, huge ones, and what is no number in JSON."""
    bodies = []
    for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "max_new_tokens"):
        kind = messages.kind_of("generate", name)
        edges = [number for word in kind[1:] for number in near(word)]
        for value in [*map(str, [*edges, *messages.EDGES]), *messages.NUMBERS, "true", '"1"']:
            limit = "" if name == "max_new_tokens" else ',"max_new_tokens":2'
            bodies.append(f'{{"prompt":"The","{name}":{value}{limit}}}')
    yield from talk("user", bodies)
    versions = [*map(str, messages.EDGES[:12]), "1.0", "true", '"1"', "1e0", "01", "NaN", "null"]
    good = GOOD["challenge"]
    yield from strangers([good.replace(":1,", f":{value},", 1) for value in versions])


def near(word):
    """Numbers around a bound."""
    number = float(word) if "." in word else int(word)
    return (number - 1, number, number + 1, float(number), number * 1.0000001)


@case
def huge_prompt(chance):
    """Prompts as long as a request may be, and longer; many messages."""
    room = oracle.REQUEST_LIMIT - 5 - 16
    shell = len('{"prompt":"","max_new_tokens":1}')
    for size in (100_000, room - shell, room - shell + 1, (1 << 20) + 100):
        yield session("user", do("say", data=f'{{"prompt":"{"a" * size}","max_new_tokens":1}}'))
    turn = '{"role":"user","content":"a"}'
    bodies = [
        f'{{"messages":[{",".join([turn] * n)}],"max_new_tokens":1}}' for n in (0, 1, 1024, 1025)
    ]
    yield from talk("user", bodies)


@case
def deep_nesting(chance):
    """Containers within each other, around the limit and far beyond."""
    bodies = []
    for depth in (15, 16, 17, 18, 500, 5000, 100_000):
        bodies += [
            "[" * depth,
            '{"a":' * depth + "1" + "}" * depth,
            '{"a":' + "[" * depth + "]" * depth + "}",
        ]
        bodies.append('{"prompt":' + "[" * (depth - 1) + "]" * (depth - 1) + "}")
    yield from everywhere(bodies)


@case
def null_bytes(chance):
    """Zeros raw and escaped, in names and values."""
    yield from at_each_step(
        lambda good: [
            good.replace('"', '"\0', 1),
            good + "\0",
            "\0" + good,
            good.replace(":", ":\0", 1),
        ]
    )
    texts = [r'{"prompt":"\u0000","max_new_tokens":1}', r'{"prompt\u0000":"a"}', '{"prompt":"\0"}']
    yield from talk("user", texts + [r'{"prompt":"a\u0000b","max_new_tokens":1,"date":"\u0000"}'])


@case
def unicode_abuse(chance):
    """Surrogates, overlong forms, other encodings, marks, look-alikes, what normalises to more."""
    texts = [f'{{"prompt":{text},"max_new_tokens":1}}' for text in messages.LETTERS]
    texts += [f"{{{text}:1}}" for text in messages.LETTERS]
    raw = [b'{"prompt":"' + bad + b'","max_new_tokens":1}' for bad in messages.BAD_UTF8]
    raw += [
        REQUEST.encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7")
    ]
    raw += [b"\xef\xbb\xbf" + REQUEST.encode(), REQUEST.encode()[:-1] + b"\xe2\x80\xa8}"]
    yield from everywhere([*texts, *raw])
    good = [messages.write({"prompt": text, "max_new_tokens": 1}) for text in messages.WICKED]
    yield from talk("user", good)


@case
def injections(chance):
    """Format strings, SQL, paths, templates, shells, prototype names: as values and as names."""
    bodies = [messages.write({"prompt": text, "max_new_tokens": 1}) for text in messages.WICKED]
    bodies += [
        messages.write({"messages": [{"role": "user", "content": text}], "max_new_tokens": 1})
        for text in messages.WICKED
    ]
    bodies += [messages.write({text: True}) for text in messages.WICKED]
    bodies += [
        messages.write({"messages": [{"role": text, "content": "a"}]}) for text in messages.WICKED
    ]
    bodies += [messages.write({name: {"polluted": True}, "prompt": "a"}) for name in messages.NAMES]
    yield from talk("user", bodies)
    yield from talk("owner", [messages.write({"revoke": text}) for text in messages.WICKED])
    tokens = [messages.write({"token": text.ljust(16, "x")}) for text in messages.WICKED]
    yield from offers("user", tokens)


@case
def binary_garbage(chance):
    """Random bytes, framed and not, before, during and after the handshake."""
    for size in (1, 3, 4, 64, 4096, 70_000):
        data = as_data(chance.randbytes(size))
        yield [do("open"), do("send", data=data)]
        yield [do("open"), do("frame", data=data)]
        yield [do("greet", role="user"), do("frame", data=data)]
        yield session("user", do("frame", data=data))
        yield session("owner", do("record", data=data, way="bare"))


@case
def other_protocols(chance):
    """HTTP, TLS, SSH, Redis, SMB and a proxy's greeting at the port."""
    greetings = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"\0\0\0\x45\xffSMBr" + bytes(60),
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"EHLO a\r\n",
    ]
    for greeting in greetings:
        yield [do("open"), do("send", data=as_data(greeting)), do("leave", how="half")]


# ---------------------------------------------------------------- the protocol's own


@case
def every_split(chance):
    """A whole session a byte at a time, and cut in other ways: it is all the same."""
    good = GOOD["challenge"]
    for cut in (1, 2, 3, 5, 7, 100):
        say = do("say", data=REQUEST, cut=cut)
        yield [do("open"), do("frame", data=good, cut=cut), do("token"), do("read"), say, say]
    framed = struct.pack(">I", len(good.replace("@SHARE@", "0" * 768).replace("@NONCE@", "0" * 64)))
    yield [do("open"), do("send", data=framed.decode("latin-1") + good + "\0\0\0\5hello")]


@case
def bad_shares(chance):
    """Key shares that would give the secret away: 0, 1, p - 1, p and beyond; of other sizes."""
    values = [0, 1, 2, oracle.PRIME - 2, oracle.PRIME - 1, oracle.PRIME, oracle.PRIME + 1]
    shares = [f"{value:0768x}" for value in values] + ["f" * 768, "0" * 766, "0" * 770, ""]
    shares += [oracle.SHARE.hex().upper(), "g" * 768, oracle.SHARE.hex()[:-1] + "\\n"]
    yield from strangers([GOOD["challenge"].replace("@SHARE@", share) for share in shares])


@case
def other_versions(chance):
    """Versions, roles and kinds of evidence that this enclave does not have."""
    good = GOOD["challenge"]
    bodies = [good.replace(":1,", f":{version},", 1) for version in (0, 2, 3, 1 << 31)]
    bodies += [good.replace('"psk"', f'"{kind}"') for kind in ("tpm2", "tsm", "none", "PSK", "")]
    bodies += [good.replace('"user"', f'"{role}"') for role in ("admin", "", "USER", "owner ")]
    yield from strangers(bodies)


@case
def records_of_other_forms(chance):
    """Well sealed, but ids, several records for one message, padding, lengths that lie, no end."""
    good = STATUS.encode()
    plains = [
        oracle.plain_message(good, 1),
        oracle.plain_message(good, 2),
        oracle.plain_message(good, 0, len(good), b"\1"),
        oracle.plain_message(good, 0, len(good), bytes(7) + b"\1"),
        oracle.plain_message(good, 0, len(good) + 1),
        oracle.plain_message(good, 0, len(good) - 1),
        oracle.plain_message(good, 0, 0xFFFFFFFF),
        oracle.plain_message(b"", 0, 9),
        b"",
        b"\0",
        b"\0\0\0\0",
    ]
    for role in gate.ROLES:
        for plain in plains:
            yield [do("greet", role=role), do("record", data=as_data(plain))]
            yield session(role, do("record", data=as_data(plain)), do("say", data=STATUS))
    padded = as_data(oracle.plain_message(good, 0, len(good), bytes(40)))
    yield session("owner", do("record", data=padded), do("read"), do("say", data=STATUS))


@case
def replayed_messages(chance):
    """A record sent again, one left out, one changed, one that is not sealed, of either role."""
    for role, body in (("user", REQUEST), ("owner", STATUS)):
        say = do("say", data=body)
        plain = as_data(oracle.plain_message(body.encode()))
        for way in ("again", "skipped", "flipped", "bare"):
            record = do("record", data=plain, way=way)
            yield session(role, say, do("read"), record, do("read"))
            yield session(role, say, say, do("read"), say, record, say)
            yield [do("greet", role=role), do("token"), record]
            yield [do("greet", role=role), record]
        yield [do("greet", role=role), do("record", data=plain), do("token")]


@case
def replayed_leases(chance):
    """A lease's id, or its sequence, a second time: from the same owner, and from another one."""
    again = gate.UNLOCK.replace("@LEASE@", "77" * 16)
    late = gate.UNLOCK.replace("@SEQUENCE@", str(gate.SEQUENCE_START + 1))
    for bodies in ([again, again, again], [late, late], [gate.UNLOCK, late, gate.UNLOCK]):
        actions = []
        for number, body in enumerate(bodies):
            actions += [
                do("greet", number, role="owner"),
                do("say", number, data=body),
                do("read", number),
            ]
        yield [{"do": "world", "state": "locked"}, *actions]
        yield actions


@case
def token_of_the_other_role(chance):
    """A user with the owner's token, an owner with a user's; someone else's; none."""
    others = ['{"token":"mu-0000000000000000"}', '{"log":true}', STATUS, REQUEST, CANCEL, "{}"]
    both = gate.UNLOCK[:-1] + ',"token":"@TOKEN@"}'
    yield from offers("user", [GOOD["owner"], gate.UNLOCK, both, *others])
    yield from offers("owner", [GOOD["user"], both, *others[:1], *others[2:]])
    wrong = [gate.UNLOCK.replace("@KEY@", "00" * 32), gate.UNLOCK.replace("@MODEL@", "00" * 32)]
    yield from offers("owner", wrong)
    locked = {"do": "world", "state": "locked"}
    for role, body in (("user", GOOD["user"]), ("owner", GOOD["owner"]), ("owner", '{"log":true}')):
        yield [locked, do("greet", role=role), do("say", data=body), do("read")]


@case
def states_out_of_order(chance):
    """Each step's message at another step, twice, and after the end."""
    steps = [
        GOOD["challenge"],
        GOOD["user"],
        GOOD["owner"],
        REQUEST,
        STATUS,
        CANCEL,
        '{"log":true}',
    ]
    yield from everywhere(steps)
    for role in gate.ROLES:
        yield [do("greet", role=role), do("frame", data=GOOD["challenge"])]
        yield session(role, do("token"), do("frame", data=GOOD["challenge"]))
        yield session(role, do("frame", data=GOOD["challenge"]))
        yield [do("greet", role=role), do("frame", data=GOOD[role])]
        yield [do("greet", role=role), do("leave", how="half")]
        yield [do("greet", role=role), do("token"), do("leave", how="half")]
        yield [do("open"), do("frame", data=GOOD["challenge"]), do("frame", data=GOOD["challenge"])]


@case
def cancels(chance):
    """Cancels before, during and after answers; twice; for nobody's answer; and hanging up."""
    request, held, cancel = (do("say", data=body) for body in (REQUEST, HELD, CANCEL))
    read = do("read")
    yield session("user", cancel, cancel, request, read, cancel, cancel, request, read, cancel)
    yield session("user", held, cancel, read, held, cancel, cancel, request, read)
    yield session("user", held, cancel, request, cancel, held, cancel, read)
    for how in ("close", "half", "reset"):
        yield session("user", held, do("leave", how=how))
        yield session("user", request, do("leave", how=how))
        yield session("user", held, cancel, do("leave", how=how))


@case
def two_requests(chance):
    """What is said while an answer runs ends it; each is answered in turn."""
    others = [REQUEST, HELD, STATUS, "{}", "x", '{"cancel":false}', '{"cancel":true,"prompt":"a"}']
    for other in others:
        held, other = do("say", data=HELD), do("say", data=other)
        yield session("user", held, other, do("read"), do("say", data=REQUEST), do("read"))
        yield session("user", do("say", data=REQUEST), other, do("say", data=CANCEL), do("read"))


@case
def scores(chance):
    """An owner has answers judged: of no ids, of many, of ids that nobody has; a user may not."""
    lists = ("[]", "[0]", "[1,2,3]", "[299]", "[300]", str([7] * 500), "[16777216]")
    lists += ("[16777217]", "[-1]", "[1.0]", "[true]", "{}", "null", "[[1]]", '["1"]')
    bodies = [SCORE % ids for ids in lists]
    bodies += [(SCORE % "[1]").replace("0.5", value) for value in ("0", "1000000", "-1", "1e7")]
    bodies += [
        (SCORE % "[1]").replace('"seed":1', more) for more in ('"top_k":5', '"encoding":"ids"')
    ]
    actions = [action for body in bodies for action in (do("say", data=body), do("read"))]
    yield session("owner", *actions, do("say", data=STATUS), do("read"))
    yield session("user", *actions, do("say", data=REQUEST), do("read"))
    score, cancel, read = do("say", data=SCORE % "[1,2,3]"), do("say", data=CANCEL), do("read")
    yield session("owner", cancel, score, cancel, read, cancel, cancel, score, read, cancel)
    for how in ("close", "half", "reset"):
        yield session("owner", score, do("leave", how=how))
        yield session("owner", score, cancel, do("leave", how=how))


@case
def pipelining(chance):
    """Everything at once: a hundred messages before a reply is read."""
    for role, body in (("user", '{"prompt":1}'), ("owner", STATUS)):
        yield session(role, *[do("say", data=body)] * 100)
        yield [do("greet", role=role), do("token"), *[do("say", data=body)] * 30]


@case
def several_peers(chance):
    """Sessions side by side: what one does is nothing to the others; a lock is the end of all."""
    users, owner = (1, 2), 3
    actions = [do("greet", n, role="user") for n in users] + [do("greet", owner, role="owner")]
    actions += [do("token", n) for n in (*users, owner)]
    for _ in range(3):
        actions += [
            do("say", 1, data=HELD),
            do("say", 2, data=REQUEST),
            do("say", owner, data=STATUS),
        ]
        actions += [do("read", owner), do("read", 2), do("say", 1, data="{}"), do("read", 1)]
    yield actions
    for command in ('{"revoke":"@USER@"}', '{"lock":true}'):
        yield [*actions, do("say", 1, data=HELD), do("say", owner, data=command), do("read", owner)]


@case
def connection_flood(chance):
    """More strangers than there are places; those who have proved themselves are served."""
    openings = [do("open", number) for number in range(10, 160)]
    partial = [do("send", number, data="\0\0") for number in range(10, 160, 3)]
    yield [*session("owner"), *openings, *partial, do("say", data=STATUS), do("read")]
    resets = [do("leave", number, how="reset") for number in range(10, 160)]
    yield [*openings, *resets, *session("user", do("say", data=REQUEST), do("read"))]


@case
def slow_peers(chance):
    """Slow loris: silent, or a frame that never ends, at every step. Each is cut off in the end."""
    stalls = [do("open", 1), do("stall", 1)]
    for number, data in ((2, "\0"), (3, "\0\0\1\0"), (4, "\0\0\1\0{")):
        stalls += [do("open", number), do("send", number, data=data), do("stall", number)]
    for number, role in ((5, "user"), (6, "owner"), (7, "user"), (8, "owner")):
        stalls.append(do("greet", number, role=role))
        stalls += [do("send", number, data="\0\0\0\x50{")] * (number > 6) + [do("stall", number)]
    for number, role in ((9, "user"), (10, "owner")):  # these have proved themselves
        stalls += [do("greet", number, role=role), do("token", number), do("read", number)]
        stalls += [do("send", number, data="\0\0\0\x50{"), do("stall", number)]
    yield stalls


@case
def dribbling_peers(chance):
    """Slower than slow loris: a byte now and then, in the challenge and in the token."""
    actions = [do("open", 1), do("send", 1, data="\0\0\1\0{")]
    for number, role in ((2, "user"), (3, "owner")):
        actions += [do("greet", number, role=role), do("send", number, data="\0\0\1\0")]
    yield [*actions, {"do": "dribble", "peers": [1, 2, 3]}]


# ---------------------------------------------------------------- streams


def parser_stream(name):
    """Episodes of one parser's inputs."""

    def stream(chance):
        while True:
            make = targets.TARGETS[name].make
            data = [as_data(make(chance)) for _ in range(PARSED)]
            yield [{"do": "parse", "target": name, "data": body} for body in data]

    stream.__doc__ = targets.TARGETS[name].about
    return stream


def mutated(chance, forms, **more):
    """An action's data: a message of one of the forms, changed or not."""
    return as_data(messages.message(chance, chance.choice(forms), **more))


def random_talk(chance, role):
    """A long session of one role, at its end perhaps a record that breaks it."""
    forms = ("generate", "chat", "cancel") if role == "user" else ("status", "revoke")
    actions = session(role)
    for number in range(1, chance.randrange(20, 200)):
        body = mutated(chance, forms)
        if role == "user" and chance.random() < 0.05:
            body = chance.choice((HELD, REQUEST, CANCEL))
        actions.append(do("say", data=body))
        if role == "owner" and chance.random() < 0.2:
            scored = mutated(chance, ("score", "score_chat"), wrong=0.5)
            actions += [do("read"), do("say", data=scored), do("read")]
        if body == HELD:
            actions.append(do("say", data=chance.choice((CANCEL, CANCEL, "{}", REQUEST))))
        actions += [do("read")] * (number % BATCH == 0)
    return [*actions, do("read"), random_record(chance), do("say", data=STATUS)]


def random_record(chance):
    """A record that is wrong in one way or another, or right."""
    body = chance.choice((REQUEST, STATUS, CANCEL, "{}")).encode()
    plain = targets.wrong_plain(chance, 0, body)
    if chance.random() < 0.5:
        plain = oracle.plain_message(body, 0, None, bytes(chance.choice((0, 9))))
    way = chance.choice(("fair", "fair", "again", "skipped", "flipped", "bare"))
    action = do("record", data=as_data(plain), way=way)
    if chance.random() < 0.2:
        action["length"] = chance.choice((0, 5, 1 << 20, (1 << 20) + 1, 0xFFFFFFFF))
    return action


def random_tokens(chance):
    """Some peers with tokens that are changed or not."""
    actions = []
    for number in range(4):
        role = chance.choice(gate.ROLES)
        meant = role if chance.random() < 0.75 else chance.choice(gate.ROLES)
        text = gate.UNLOCK if meant == "owner" and chance.random() < 0.5 else gate.TOKENS[meant]
        form, wrong = "access" if meant == "user" else "unlock", 0.7 * (meant == role)
        body = mutated_template(chance, text, form, wrong)
        actions += [
            do("greet", number, role=role),
            do("say", number, data=body),
            do("read", number),
        ]
        if chance.random() < 0.3:
            actions += [
                do("say", number, data=chance.choice((STATUS, REQUEST))),
                do("read", number),
            ]
    return actions


def mutated_template(chance, text, form, wrong=0.75):
    """Data: a good message with marks in it, as a tree, changed or not."""
    tree = parse_template(text)
    return as_data(messages.message(chance, form, tree, wrong))


def parse_template(text):
    """A template as a tree; a mark for a number stays one."""
    value = oracle.parse_json(text.replace("@SEQUENCE@", '"@SEQUENCE@"').encode())

    def tree(value):
        if isinstance(value, dict):
            return messages.Pairs([[name, tree(item)] for name, item in value.items()])
        return messages.Raw(value) if value == "@SEQUENCE@" else value

    return tree(value)


def random_strangers(chance):
    """Challenges that are changed or not, in frames that lie or not, cut anyhow."""
    actions = []
    for number in range(8):
        text = gate.CHALLENGE % chance.choice(gate.ROLES)
        action = do("frame", number, data=mutated_template(chance, text, "challenge"))
        if chance.random() < 0.15:
            action["length"] = chance.choice((0, 1, 4096, 4097, 1 << 31, 0xFFFFFFFF))
        if chance.random() < 0.1:
            action["cut"] = chance.choice((1, 3, 100))
        actions += [do("open", number), action]
        if chance.random() < 0.2:
            actions.append(random_record(chance) | {"peer": number})
    return actions


def random_crowd(chance):
    """Some peers at once, each somewhere else, in no order."""
    actions, peers = [], {}
    for _ in range(chance.randrange(10, 60)):
        number = chance.randrange(4)
        what = chance.random()
        if number not in peers or what < 0.05:
            peers[number] = chance.choice(gate.ROLES)
            actions.append(do("greet", number, role=peers[number]))
            if chance.random() < 0.9:
                actions.append(do("token", number))
        elif what < 0.6:
            forms = (
                ("generate", "cancel") if peers[number] == "user" else ("status", "revoke", "lock")
            )
            if peers[number] == "owner" and chance.random() < 0.9:
                forms = ("status",)
            actions.append(do("say", number, data=mutated(chance, forms, wrong=0.4)))
        elif what < 0.8:
            actions.append(do("read", number))
        elif what < 0.9:
            actions.append(random_record(chance) | {"peer": number})
        else:
            actions.append(do("leave", number, how=chance.choice(("close", "half", "reset"))))
            del peers[number]
    return actions


def sessions(chance):
    """Random sessions with the gate: before, during and after the handshake."""
    while True:
        what = chance.random()
        if what < 0.6:
            episode = random_talk(chance, "user" if what < 0.4 else "owner")
        elif what < 0.75:
            episode = random_tokens(chance)
        elif what < 0.85:
            episode = random_strangers(chance)
        else:
            episode = random_crowd(chance)
        locked = chance.random() < 0.04
        yield ([{"do": "world", "state": "locked"}] if locked else []) + episode


STREAMS = {f"parser-{name}": parser_stream(name) for name in targets.TARGETS}
STREAMS["sessions"] = sessions
