"""How many bits an engine can tell at most, from the configuration alone: what is counted, channel
by channel, and how long a model takes to leave by it. For tools/exfil_timing.py bound.

Nothing is measured here. Every number follows from the constants of muprotocol and muenclave: the
cells that the meter lets out, the ticks of the gate's clock, and what Gate.charge is asked for each
time that an engine could have chosen something (CHARGES).
"""

import collections
import functools
import math
import sys

import ledger
import tap
from environment import ROOT

sys.path.insert(0, str(ROOT))
import muenclave  # noqa: E402
import muprotocol as mp  # noqa: E402

DAY = 86400  # seconds
LONG = 1000 * DAY  # over which a steady rate is taken: neither burst nor rounding shows
TICK_BITS = 1
SHAPES = {  # of a lease's policy: what who has no session's keys sees
    "plain": "which ticks have a cell",
    "constant": "when an answer ends: before that it has a cell at every tick",
}

# vocabulary: entries of the table of ids. context: tokens. audited: bits a token that an audit
# leaves, None without one. The others are as in mp.LEASE, its policy and ENCLAVE_SESSIONS.
FIELDS = "rate burst expiry vocabulary sessions context latency_ms shape audited"
Configuration = collections.namedtuple("Configuration", FIELDS)

# Where the gate charges: function, what for, channels. A test compares that with its source.
CHARGES = (
    ("Gate.load", "2 * mp.LENGTH_BITS", ("loads",)),
    ("Gate.take_message", "mp.LENGTH_BITS", ("lengths",)),
    ("Gate.take_message", "mp.ENDING_BITS", ("endings",)),
    ("Gate.pass_ticks", "now - ticks", ("ticks",)),
    ("Session.next_ids", "reply.table.cost(len(ids))", ("tokens", "cell counts")),
)
NOT_COUNTED = {
    "CPU load, memory traffic": "seen by who runs the machine; no meter sees them",
    "timing below a tick": "a cell leaves at a tick; meter, scheduler and load move it within that",
}
MALICIOUS_HOST = "his clock makes rate and expiry advice: the budget alone holds; where the "
MALICIOUS_HOST += (
    "evidence does not exclude forks (any root but tee), each fork of a running enclave "
)
MALICIOUS_HOST += "spends its lease once more"


# ---------------------------------------------------------------- what leaves, and what is charged


def table_of(config):
    """A table of ids as large as the model's: it says how they are packed and what a cell costs."""
    return made_table(config.vocabulary, mp.CELL_ROOM)


@functools.cache
def made_table(size, _):
    """mp.Vocabulary of so many ids, for cells of this room."""
    return mp.Vocabulary(mp.encode_vocabulary([b""] * size))


def supply(config, seconds):
    """{"cells", "ticks", "answers", "loads"}: how many there are at most in so many seconds.

    cells: over all sessions, as the meter lets them out, after a burst. ticks: of all replies that
    can be open. answers: each has at least a cell of its own (its last, or the READY of the session
    after one that hung up), but for those of before. loads: of the engine, by lease.
    """
    share = config.rate - config.rate // muenclave.HANDSHAKE_SHARE
    cells = (share * seconds + config.burst // 2) // mp.CELL
    ticks = config.sessions * -(-seconds * mp.NANOSECOND // tap.tick_of(config.rate))
    leases = max(1, -(-seconds // config.expiry))
    answers = cells + 2 * config.sessions  # as many as the gate has slots
    loads = (muenclave.RESPAWNS + 1) * leases
    return {"cells": cells, "ticks": ticks, "answers": answers, "loads": loads}


def amounts(config, seconds):
    """{channel: bits} that an engine can tell in so many seconds at most, each by itself.

    Together they are less, since a cell is one of ids or an answer's last: their sum is over.
    """
    of, table = supply(config, seconds), table_of(config)
    counts = table.room.bit_length()
    ids = table.cost(table.room) - counts
    if config.audited is not None:
        ids = min(ids, table.room * config.audited)
    return {
        "tokens": math.ceil(of["cells"] * ids),
        "cell counts": of["cells"] * counts,
        "ticks": math.ceil(TICK_BITS * placed(of["cells"], of["ticks"])),
        "endings": of["answers"] * mp.ENDING_BITS,
        "lengths": of["answers"] * mp.LENGTH_BITS,
        "loads": of["loads"] * 2 * mp.LENGTH_BITS,
        "handshakes": 0,
        "errors": 0,
    }


def placed(cells, ticks):
    """Bits in which ticks have a cell, of all that could: log2 of the ways, at most.

    n H(k / n) is no less than log2 of the number of ways to place up to k <= n / 2 among n (Cover
    and Thomas, Elements of Information Theory, 11.1), H the entropy of a bit.
    """
    if 2 * cells >= ticks:
        return ticks
    p = cells / ticks
    return -ticks * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) if p else 0


def seen_outside(config, seconds):
    """{channel: bits} for who sees sizes and moments of the records, but has no session's keys.

    A constant shape has a cell at every tick of an open answer: what is left is which is the last.
    """
    told = dict.fromkeys(amounts(config, seconds), 0)
    told |= {name: amounts(config, seconds)[name] for name in ("ticks", "loads")}
    if config.shape == "constant":
        told["ticks"] = min(told["ticks"], TICK_BITS * supply(config, seconds)["cells"])
    return told


def abouts(config):
    """{channel: how it is charged}, for readers."""
    table = table_of(config)
    counts = table.room.bit_length()
    return {
        "tokens": f"{table.cost(table.room) - counts:,} bits a cell of {table.room} ids",
        "cell counts": f"{counts} bits a cell: how many ids it has",
        "ticks": f"{TICK_BITS} bit a tick of an open answer: whether it has a cell, when it ends",
        "endings": f"{mp.ENDING_BITS} bits an answer: its end or refusal",
        "lengths": f"{mp.LENGTH_BITS} bits an answer: what it says of the prompt's length",
        "loads": f"{2 * mp.LENGTH_BITS} bits each, {muenclave.RESPAWNS + 1} a lease at most",
        "handshakes": "an engine chooses nothing of them; what has died shows, as a load",
        "errors": "a cell like others; each code that an engine can cause is an ending or a load",
    }


# ---------------------------------------------------------------- whether the charges cover it all


def uncovered(config):
    """{event: bits} that an engine can tell by each beyond what is charged; 0 if all is covered.

    Charges bound what is told if they are the lengths of a prefix code, so that 2^-charge summed
    over all that an engine could do is at most 1 (Kraft; Cover and Thomas, 5.2). answer: of any
    number of ticks, at each a cell of any ids or none. look: at what is left of the budget, by how
    many answers have ended since the last one, which shows also those that nobody waits for. load:
    the tick of a death, that of the load after it, a number of tokens.
    """
    table = table_of(config)
    cells = sum(
        2 ** (n * math.log2(config.vocabulary) - table.cost(n)) for n in range(1, table.room + 1)
    )
    a_tick = 2.0**-TICK_BITS * (1 + cells)
    ends = (len(mp.ENDINGS) + len(mp.REFUSALS)) * 2.0**-mp.ENDING_BITS
    lengths = 1 + config.context * 2.0**-mp.LENGTH_BITS
    answer = ends * lengths / (1 - a_tick) if a_tick < 1 else math.inf
    look = 1 / (1 - 2.0**-mp.ENDING_BITS)
    moments = config.expiry * mp.NANOSECOND / tap.tick_of(config.rate)
    load = 2 * math.log2(moments) + math.log2(config.context) - 2 * mp.LENGTH_BITS
    told = {"answer": math.log2(answer), "look": math.log2(look), "load": load}
    return {event: max(0.0, bits) for event, bits in told.items()}


def beyond_charges(config, seconds):
    """Bits that an engine can tell in so many seconds beyond what is charged, at most."""
    of, each = supply(config, seconds), uncovered(config)
    told = each["answer"] * of["answers"] + each["look"] * of["cells"] + each["load"] * of["loads"]
    return math.ceil(told)


# ---------------------------------------------------------------- the figures


def bound(config, models, compressions, budget=None, lifetime=None, source=None):
    """The figures of `exfil_timing.py bound`, as its docstring has them.

    models: [(name, bytes, source)]. budget, lifetime: bytes of a lease and of an asset, None for
    what the ledger grants by itself. source: of config.audited.
    """
    table = table_of(config)
    facts = {**config._asdict(), "bits": table.bits, "cell": mp.CELL, "ids_per_cell": table.room}
    facts |= {"respawns": muenclave.RESPAWNS}
    facts |= {"tick_seconds": tap.tick_of(config.rate) / mp.NANOSECOND}
    free = config._replace(audited=None)
    columns = {"day": amounts(free, DAY), "lease": amounts(free, config.expiry)}
    if config.audited is not None:
        columns["audited_day"] = amounts(config, DAY)
    columns["outside_day"] = seen_outside(free, DAY)
    channels = [
        {"name": name, "charge": text} | {key: column[name] for key, column in columns.items()}
        for name, text in abouts(config).items()
    ]
    audit = None if config.audited is None else {"bits_per_token": config.audited, "source": source}
    return {
        "configuration": facts,
        "channels": channels,
        "sum": {key: sum(column.values()) for key, column in columns.items()},
        "uncovered": uncovered(config) | {"day": beyond_charges(config, DAY)},
        "seen_without_keys": SHAPES[config.shape],
        "not_counted": NOT_COUNTED,
        "malicious_host": MALICIOUS_HOST,
        "audit": audit,
        "models": [out_of(config, *model, compressions, budget, lifetime) for model in models],
    }


def steady(config):
    """Bits a second in the long run, all channels."""
    begin, end = (sum(amounts(config, seconds).values()) for seconds in (0, LONG))
    return (end - begin) / LONG


def out_of(config, name, size, source, compressions, budget, lifetime):
    """What of a model leaves, and when: an entry of "models"."""
    lifetime = size // ledger.LIFETIME_DIVISOR if lifetime is None else lifetime
    budget = lifetime // ledger.GRANT_DIVISOR if budget is None else budget
    free = steady(config._replace(audited=None)) / 8
    by_clock = sum(amounts(config._replace(audited=None), config.expiry).values()) // 8
    lease = {"budget": budget, "by_clock": by_clock, "bytes": min(budget, by_clock)}
    lease["seconds"] = budget / free
    times = []
    for compression in compressions:
        least = size / compression
        is_enough = lifetime >= least
        seconds = least / free if is_enough else None
        within = {"seconds": seconds, "share": min(1, lifetime / least), "is_enough": is_enough}
        times.append({"compression": compression, "bytes": least, "rate": least / free})
        audited = None if config.audited is None else least * 8 / steady(config)
        times[-1] |= {"audited": audited, "lifetime": within}
    facts = {"name": name, "bytes": size, "source": source, "lifetime": lifetime}
    return facts | {"lease": lease, "times": times}
