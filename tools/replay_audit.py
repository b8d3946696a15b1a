"""The replay audit: whether a proxy's audit log is what the enclave said, and an honest engine's.

    replay_audit.py check      the log against the chain's heads that the owner has; no enclave
    replay_audit.py audit      also a sample of it, re-scored by a second enclave of the owner's
    replay_audit.py calibrate  the tolerance for that, from the log of an enclave that is trusted
    replay_audit.py measure    what an audit finds, tried on the demo model

muproxy writes the log (--audit-log), so it proves nothing by itself. Each exchange is hashed into
the chain that the gate keeps, and the owner has heads of that: his ledger keeps them, as closing
statements and `owner.py status` have told them; --head names another. The log is followed backwards
from there. A log that leads to no head of his, or not back to the chain's beginning, is an alarm:
what lies before a gap can't be told from what somebody made up. The order of the lines does not
matter. A ledger that also granted leases to enclaves that only scored has heads of them, too:
--lease names the one whose log this is.

Then the owner draws the sample, by the randomness of his own machine, so that nobody knew before
which exchanges he would look at. A second enclave, of another build or machine, is unlocked by
`owner.py unlock` as usual, but without --verified, and scores each token of the sample: the
sampling noise is a function of the seed, so an honest engine had no choice but rounding. The
tolerance for that comes from `calibrate`; --exact wants every token equal, which the same code
gives on the same kind of machine if no other answer runs beside (--slots 1). ENCLAVE_CONTEXT has to
be the same in both enclaves: an answer that nothing else limits ends there.

How many bits got past the audit is bounded as in arXiv 2511.02620: the logarithm of how many tokens
were within the tolerance, and of any token where one may be refused. Tokens count as independent.

--json FILE (- for standard output) writes {"tool": "replay_audit", "version": 1, "verb", "chain":
{"heads": [{"lease", "head", "spent": bytes or null, "exchanges", "is_whole"}], "entries",
"verified", "changed", "broken": [line numbers], "cut", "refused", "unlinked"}, "alarms": [text]};
audit adds "sample": {"share", "exchanges", "tokens", "lines"}, "rule": {"tolerance", "share",
"false_alarm", "confidence"}, "tokens": {"all", "equal", "within", "refused", "refused_rate",
"refused_interval", "allowed"}, "margins": {quantile: logits}, "endings": {ending: exchanges},
"unnoticed": {bits a token: "within", "within_interval", "refused", "all", "most"; "rate": of
refused tokens, below which there may be no alarm; bits: "log", "unaudited_endings"}, "detection":
{"exchange_bits", "exchanges": [mean, most], "bits": [mean, most]} of an engine that chooses its
tokens freely; calibrate adds "calibration".

Exit status: 0 no alarm; 1 an alarm, or refused; 2 wrong flags or files; 3 unreachable.
"""

import collections
import contextlib
import itertools
import json
import math
import pathlib
import secrets
import sys

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ledger  # noqa: E402
import owner  # noqa: E402
import replay_statistics as stats  # noqa: E402

import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402
from muproxy import DONE, REFUSED, USAGE, Failure  # noqa: E402

VERSION = 1
BEGINNING = bytes(32).hex()  # the chain's head before its first exchange

# ---------------------------------------------------------------- the log

REQUESTS = (mp.is_object(mp.GENERATE), mp.is_object(mp.GENERATE_CHAT))
ENTRY = {  # a line of the log
    "lease": mp.is_hex(16),
    "request": lambda v: any(is_one(v) for is_one in REQUESTS) and "seed" in v,
    "ids": mp.SCORED["ids"],
    "ending": mp.is_one_of(None, *mp.ENDINGS, *mp.ERRORS),  # None: the connection was lost
    "heads": lambda v: v is None or mp.HEADS(v),  # of the chain, before and after the exchange
}
Entry = collections.namedtuple("Entry", "line lease request ids ending heads")


def read_log(path):
    """([Entry], numbers of the lines that are none) of an audit log. Raises OSError."""
    entries, broken = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entries.append(Entry(number, **mp.parse_message(line, ENTRY)))
            except mp.ProtocolError:
                broken.append(number)
    return entries, broken


def admitted(entry, leases=()):
    """The entry as the gate chained it; None if it is not what the gate chained.

    leases: what the lease may also have been: a session does not hear of one that was added to its
    own, and the chain has the newest. A verified lease's request has neutral values. Where an error
    ended the session with the answer, the session heard the error, and the chain has a cancel.
    """
    before, after = entry.heads
    requests = (entry.request, entry.request | mp.NEUTRAL)
    endings = (entry.ending, "cancelled") if entry.ending in mp.ERRORS else (entry.ending,)
    for lease, request, ending in itertools.product((entry.lease, *leases), requests, endings):
        head = mp.chain(bytes.fromhex(before), lease, request, entry.ids, ending)
        if head.hex() == after:
            return entry._replace(lease=lease, request=request, ending=ending)
    return None


# ---------------------------------------------------------------- the chain

# What the owner has of a chain. spent: bytes, by its closing statement; None while it goes on.
Head = collections.namedtuple("Head", "lease head spent")


class Chain:
    """The exchanges of a log that lead to the heads that the owner has.

    verified: [Entry] of them, the request as the gate admitted it, in the chain's order. found:
    [(Head, exchanges that lead to it and to none before, whether back to the beginning)]. changed,
    cut (its end was not heard), refused (before it began), unlinked: [Entry] of the others.
    """

    def __init__(self, entries, heads):
        self.entries, self.verified, self.found = entries, [], []
        beside = [entry for entry in entries if entry.heads is None]
        self.cut = [entry for entry in beside if entry.ids or entry.ending is None]
        self.refused = [entry for entry in beside if entry not in self.cut]
        self.changed, by_after = [], {}
        leases = sorted({head.lease for head in heads} | {entry.lease for entry in entries})
        for entry in entries:
            if entry.heads is None:
                continue
            if (found := admitted(entry, leases)) is None:
                self.changed.append(entry)
            else:
                by_after.setdefault(found.heads[1], found)
        whole = {BEGINNING}  # heads from which we know the way to the beginning
        seen = {}
        for head in heads:
            path, at = [], head.head
            while at in by_after and at not in seen:
                seen[at] = by_after[at]
                path.append(by_after[at])
                at = by_after[at].heads[0]
            if at in whole:
                whole |= {entry.heads[1] for entry in path}
            self.found.append((head, len(path), at in whole))
            self.verified += reversed(path)
        lines = {entry.line for entry in (*self.verified, *beside, *self.changed)}
        self.unlinked = [entry for entry in entries if entry.line not in lines]

    def alarms(self):
        """What speaks against the log, a line each."""
        found, leases = [], {entry.lease for entry in self.entries}
        for head, count, is_whole in self.found:
            if not is_whole:
                text = f"{name_of(head)}: {count:,} exchanges lead to its head, and not back to the"
                text += " beginning of the chain: what lies before is not verified"
                if head.lease and head.lease not in leases:
                    text += "; no line is of that lease: did its enclave only score? --lease ID"
                    text += " names the one to look at"
                if head.spent is not None:
                    text += f"; of the {head.spent:,} bytes spent, what that took is unknown"
                found.append(text)
        for entry in self.changed:
            found.append(f"line {entry.line}: not what the enclave said: its hash is another")
        closed = {head.lease for head, _, _ in self.found if head.spent is not None}
        beside = [entry for entry in self.unlinked if entry.lease in closed]
        if beside:
            text = f"{len(beside):,} exchanges of closed leases lead to no head of the owner's"
            found.append(f"{text}: {lines_of(entry.line for entry in beside)}")
        return found

    def facts(self, broken):
        """The chain's part of the JSON document; broken: numbers of lines."""
        heads = [
            head._asdict() | {"exchanges": count, "is_whole": is_whole}
            for head, count, is_whole in self.found
        ]
        facts = {"heads": heads, "entries": len(self.entries), "verified": len(self.verified)}
        facts |= {"changed": [entry.line for entry in self.changed], "broken": broken}
        facts |= {"cut": len(self.cut), "refused": len(self.refused)}
        return facts | {"unlinked": len(self.unlinked)}


def name_of(head):
    """How a head is called in the report."""
    return f"lease {head.lease}" if head.lease else "the head"


def lines_of(numbers):
    """Numbers of lines for a reader, the first of them."""
    numbers = list(numbers)
    return f"lines {', '.join(map(str, numbers[:8]))}{', …' if len(numbers) > 8 else ''}"


def owner_heads(options, asset=None):
    """The heads that the owner has: of the ledger's closing statements, or --head. Failure.

    asset: only this one's leases, None for all.
    """
    heads = []
    if options.head is not None:
        if not mp.is_hex(32)(options.head):
            raise Failure("--head: the chain's head, 64 hexadecimal digits, as owner.py status has")
        heads.append(Head(options.lease or "", options.head, None))
    path = options.ledger or (f"{options.key}.ledger" if getattr(options, "key", None) else None)
    if path is not None and (options.ledger or options.head is None):
        with ledger.Ledger(path, options.witness) as book:
            for event in book.events:
                grant = book.grants.get(event.get("lease"), {})
                is_ours = asset in (None, grant.get("asset"))
                is_wanted = options.lease in (None, event.get("lease"))
                if "head" in event and is_ours and is_wanted:
                    heads.append(Head(event["lease"], event["head"], event.get("spent")))
    if not heads:
        where = f"{path} has no closing statement of it" if path else "--ledger FILE or --head HEX"
        raise Failure(f"nothing to check the log against: {where}; owner.py lock brings one")
    return heads


def check_log(options, asset=None):
    """(Chain, broken lines, alarms) of the log that the flags name. Raises Failure, OSError."""
    if options.log is None:
        raise Failure("--log FILE: what muproxy wrote")
    heads = owner_heads(options, asset)
    entries, broken = read_log(options.log)
    chain = Chain(entries, heads)
    alarms = [f"not an exchange, or cut short: {lines_of(broken)}"] if broken else []
    return chain, broken, alarms + chain.alarms()


# ---------------------------------------------------------------- scoring

COLDEST = 1e-5  # a lower temperature is greedy, and scores are plain logits
Scored = collections.namedtuple("Scored", "entry margins counts prompt_tokens refusal")


def scale(request):
    """How much larger than its logit's a rounding error is in a token's score."""
    temperature = request.get("temperature", 1)
    return 1 / temperature if temperature >= COLDEST else 1


def code_limit(request, tolerance):
    """The largest code of a margin that a tolerance (logits) allows an answer to this request."""
    return stats.code_within(tolerance * scale(request))


def score(session, entry, tolerance):
    """Have a session's enclave score an exchange: Scored. tolerance: in logits.

    margins: a code for each id and for the end, 0 for what this engine had chosen; it stops at an
    id that is an end. counts: as many codes, of how many tokens were within the tolerance. refusal:
    the code of the error by which it did not answer. Raises ProtocolError for any other error.
    """
    within = stats.margin_below(code_limit(entry.request, tolerance))
    request = entry.request | {"score": {"ids": entry.ids, "tolerance": within}}
    codes = []
    try:
        for part in session.exchange(request, mp.CODES):
            codes += part
    except mp.ProtocolError as error:
        if error.code not in mp.REFUSALS:
            raise
        return Scored(entry, [], [], 0, error.code)
    prompt_tokens = session.final["usage"]["prompt_tokens"]
    return Scored(entry, codes[::2], codes[1::2], prompt_tokens, None)


def chosen(scored):
    """[(code of the margin, count)] of what the engine chose: the ids, and an end that it chose.

    Any other end is not the engine's to choose, or is judged by `ending_problem`.
    """
    codes, entry = list(zip(scored.margins, scored.counts)), scored.entry
    return codes[: len(entry.ids) + (entry.ending == "stop")]


def ending_problem(scored, context):
    """Why an exchange can't have ended as it did, or None. context: of the model, tokens."""
    entry, count = scored.entry, len(scored.entry.ids)
    if scored.refusal or entry.ending in mp.REFUSALS:
        if scored.refusal == entry.ending and not count:
            return None
        here = f"refused as {scored.refusal}" if scored.refusal else "answered"
        return f"it ended as {entry.ending}; here it is {here}"
    limit = entry.request.get("max_new_tokens", context - scored.prompt_tokens)
    if count > limit or (entry.ending == "stop" and count == limit):
        return f"it ended as {entry.ending} after {count:,} tokens; its limit is {limit:,}"
    if entry.ending == "length" and count != limit:
        return f"it ended by length after {count:,} tokens; its limit is {limit:,}"
    if len(scored.margins) < count + (entry.ending == "stop"):
        return f"its token {len(scored.margins):,} is an end, and it went on"
    return None


# ---------------------------------------------------------------- the verdict

# What an audit goes by. tolerance: logits. share: of an honest engine's tokens, at most so many are
# beyond it. false_alarm: the probability that an honest log is an alarm. confidence: of all that is
# estimated.
Rule = collections.namedtuple("Rule", "tolerance share false_alarm confidence")
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1)


class Verdict:
    """What the scores of a sample say. alarms: a line each; figures: the JSON document's parts.

    sample: [Scored]. chain: the Chain that it was drawn from. context: of the model, tokens.
    """

    def __init__(self, sample, chain, rule, vocabulary, context):
        self.sample, self.chain, self.rule = sample, chain, rule
        self.size = len(vocabulary)
        self.picked = [chosen(scored) for scored in sample]
        self.limits = [code_limit(s.entry.request, rule.tolerance) for s in sample]
        self.refused = [
            sum(code > limit for code, _ in tokens)
            for tokens, limit in zip(self.picked, self.limits, strict=True)
        ]
        self.problems = [ending_problem(scored, context) for scored in sample]
        self.count, self.total = sum(map(len, self.picked)), sum(self.refused)
        self.allowed = self.least(self.count) - 1
        self.alarms = self.judge(range(len(sample)))
        self.figures = {"tokens": self.tokens(), "margins": self.margins()}
        self.figures |= {"endings": self.endings(), "unnoticed": self.unnoticed()}
        self.figures["detection"] = self.detection()

    def least(self, tokens, exchanges=1):
        """How many refused ones of so many tokens are an alarm.

        Half of the chance of a false one is the whole sample's, half is shared by its exchanges.
        """
        chance = self.rule.false_alarm / 2 / exchanges
        return stats.least_surprising(tokens, self.rule.share, chance)

    def judge(self, numbers):
        """The alarms of an audit of these exchanges of the sample, a line each."""
        found = []
        for number in numbers:
            line = f"line {self.sample[number].entry.line}"
            if self.problems[number]:
                found.append(f"{line}: {self.problems[number]}")
            count, refused = len(self.picked[number]), self.refused[number]
            if refused and refused >= (least := self.least(count, len(numbers))):
                text = f"{refused:,} of {count:,} tokens refused"
                found.append(f"{line}: {text}; {least:,} are an alarm")
        count = sum(len(self.picked[number]) for number in numbers)
        total, least = sum(self.refused[number] for number in numbers), self.least(count)
        if total >= least:
            text = f"{total:,} of {count:,} tokens refused, over the whole sample"
            found.append(f"{text}; {least:,} are an alarm")
        return found

    def tokens(self):
        """How many were equal, within the tolerance, refused; the rate of these."""
        equal = sum(code == 0 for tokens in self.picked for code, _ in tokens)
        within = self.count - equal - self.total
        facts = {"all": self.count, "equal": equal, "within": within, "refused": self.total}
        interval = stats.rate_interval(self.total, self.count, self.rule.confidence)
        facts |= {"refused_rate": self.total / max(self.count, 1), "refused_interval": interval}
        return facts | {"allowed": self.allowed}

    def margins(self):
        """Quantiles of the margins of accepted tokens that were not equal, in logits, at most."""
        found = [
            stats.margin_below(code) / scale(scored.entry.request)
            for scored, tokens, limit in zip(self.sample, self.picked, self.limits, strict=True)
            for code, _ in tokens
            if 0 < code <= limit
        ]
        return stats.quantiles(found, QUANTILES)

    def endings(self):
        """{ending: exchanges}."""
        return dict(collections.Counter(scored.entry.ending for scored in self.sample))

    def unnoticed(self):
        """Bits a token that an engine can have hidden without an alarm, at the worst."""
        counts = [count for tokens in self.picked for _, count in tokens]
        bits = stats.admissible_bits(counts, self.size)
        confidence, most = self.rule.confidence, math.log2(self.size)
        within, low, high = stats.mean_interval(bits, most, confidence)
        # A higher rate of refused tokens would have been an alarm, with this confidence.
        rate = stats.upper_rate(self.allowed, self.count, confidence) if self.count else 1
        refused = stats.refused_bits(rate, self.size)
        facts = {"within": within, "within_interval": (low, high), "rate": rate, "refused": refused}
        facts |= {"all": min(most, within + refused), "most": min(most, high + refused)}
        tokens = sum(len(entry.ids) + 1 for entry in self.chain.verified)
        unaudited = sum(entry.ending not in AUDITED for entry in self.chain.verified)
        return facts | {
            "log": facts["most"] * tokens,
            "unaudited_endings": unaudited * mp.ENDING_BITS,
        }

    def detection(self):
        """How far an engine gets that puts what it likes into whole answers."""
        mean = self.count / max(len(self.sample), 1)
        bits = mean * math.log2(self.size)
        share = len(self.sample) / max(len(self.chain.verified), 1)
        exchanges = stats.until_drawn(share, self.rule.confidence) if self.sample else (1, 1)
        facts = {"exchange_bits": bits, "exchanges": exchanges}
        return facts | {"bits": [bits * number for number in exchanges]}


AUDITED = ("stop", "length", *mp.REFUSALS)  # the other endings are the proxy's or the gate's word


def draw(chain, share):
    """A sample of the verified exchanges, in the log's order, by this machine's randomness."""
    count = math.ceil(share * len(chain.verified))
    picked = secrets.SystemRandom().sample(chain.verified, count)
    return sorted(picked, key=lambda entry: entry.line)


# ---------------------------------------------------------------- commands

CALIBRATION = {
    "version": mp.is_one_of(VERSION),
    "tolerance": mp.is_number(0, 1e6),  # logits
    "share": mp.is_number(1e-9, 0.5),  # of honest tokens: at most so many are beyond it
    "confidence": mp.is_number(0.5, 0.999999),  # of that
    "tokens": mp.COUNT,  # that it was chosen by
    "refused": mp.COUNT,  # of these
    "model": mp.is_hex(32),  # digest of the sealed model
}


def read_calibration(path):
    """A file that `calibrate` wrote. Raises Failure."""
    return muproxy.load(path, lambda d: mp.parse_message(d, CALIBRATION), "a calibration")


def run_check(options):
    """`check`: the log against the heads alone."""
    chain, broken, alarms = check_log(options)
    return finish(options, {"chain": chain.facts(broken)}, alarms)


@contextlib.contextmanager
def scorer(options, chain, picked):
    """A session with the owner's second enclave, verified and unlocked. Raises Failure."""
    token = owner.read_owner(options)
    with contextlib.closing(muproxy.connector(options)()) as session:
        if options.json != "-":
            muproxy.print_checks(session.checks, options.reference)
        ready = session.prove(token, muproxy.show_progress)
        if ready["status"] != "ready":
            raise Failure("the enclave that is to score is locked: owner.py unlock", REFUSED)
        if ready["lease"] in {entry.lease for entry in chain.entries}:
            text = "the enclave that is to score is the one that answered"
            raise Failure(f"{text}: take another one, or unlock it anew after its lease", REFUSED)
        if options.vocabulary.digest != ready["vocabulary"]:
            raise Failure("--vocabulary FILE: the token table (.vocab) of the enclave's model")
        needed = sum(2 * len(entry.ids) + 64 for entry in picked)
        if needed > ready["budget_left"]:
            left = f"its lease has {ready['budget_left']:,} bytes left"
            text = f"scoring takes about {needed:,} bytes, and {left}"
            raise Failure(f"{text}: owner.py unlock --budget N, or a smaller --sample", REFUSED)
        yield session


def score_all(options, session, picked, tolerance):
    """[Scored] of these exchanges, telling how far it is."""
    found = []
    for number, entry in enumerate(picked, 1):
        found.append(score(session, entry, tolerance))
        if number % 100 == 0 or number == len(picked):
            print(f"replay_audit: {number:,} of {len(picked):,} exchanges", file=sys.stderr)
    return found


def check_shares(options, *names):
    """Refuse a flag that is no share, above 0 and below 1 (--sample: or 1). Raises Failure."""
    for name in names:
        value = getattr(options, name.replace("-", "_"))
        if not 0 < value < 1 and not (name == "sample" and value == 1):
            raise Failure(f"--{name}: above 0 and below 1 is wanted")


def run_audit(options):
    """`audit`: the log, and a sample of it re-scored."""
    check_shares(options, "sample", "false-alarm", "confidence")
    known = options.calibration
    if (known is None) == (not options.exact):
        text = "say what is equal enough: --calibration FILE, which calibrate makes, or --exact"
        raise Failure(text)
    if known and options.model and known["model"] != options.model.digest:
        raise Failure("--calibration is of another model: calibrate anew")
    tolerance, share = (0, 0) if options.exact else (known["tolerance"], known["share"])
    rule = Rule(tolerance, share, options.false_alarm, options.confidence)
    asset = options.model.fields["asset"] if options.model else None
    chain, broken, alarms = check_log(options, asset)
    picked = draw(chain, options.sample)
    with scorer(options, chain, picked) as session:
        sample = score_all(options, session, picked, tolerance)
        verdict = Verdict(sample, chain, rule, options.vocabulary, session.ready["context"])
    facts = {"chain": chain.facts(broken), "rule": rule._asdict()}
    lines = [entry.line for entry in picked]
    facts["sample"] = {"share": options.sample, "exchanges": len(picked), "lines": lines}
    facts["sample"]["tokens"] = verdict.count
    return finish(options, facts | verdict.figures, alarms + verdict.alarms)


def run_calibrate(options):
    """`calibrate`: choose the tolerance, by the log of an enclave that is trusted."""
    check_shares(options, "sample", "refused", "confidence")
    if options.output is None:
        raise Failure("--output FILE: where the calibration is to go")
    asset = options.model.fields["asset"] if options.model else None
    chain, broken, alarms = check_log(options, asset)
    if alarms:  # such a log calibrates nothing
        return finish(options, {"chain": chain.facts(broken)}, alarms)
    picked = draw(chain, options.sample)
    with scorer(options, chain, picked) as session:
        sample = score_all(options, session, picked, 0)
    facts = {"model": options.model.digest, "confidence": options.confidence}
    try:
        facts |= calibrate(sample, options.refused, options.confidence)
    except ValueError as error:
        raise Failure(f"{error} for --refused {options.refused:g}", REFUSED) from None
    with open(options.output, "w", encoding="ascii") as file:
        file.write(json.dumps(facts, indent=1) + "\n")
    text = f"tolerance {facts['tolerance']:.3g} logits: {facts['refused']:,} of"
    text += f" {facts['tokens']:,} honest tokens are beyond it, at most {facts['share']:.2%} of all"
    say(options, text)
    return finish(options, {"chain": chain.facts(broken), "calibration": facts}, [])


def calibrate(sample, share, confidence):
    """The calibration of honest answers' scores, without model and confidence. ValueError."""
    margins = [
        stats.margin_below(code) / scale(scored.entry.request)
        for scored in sample
        for code, _ in chosen(scored)
    ]
    tolerance, refused = stats.choose_tolerance(margins, share, confidence)
    facts = {"version": VERSION, "tolerance": tolerance, "share": share}
    return facts | {"tokens": len(margins), "refused": refused}


def run_measure(options):
    """`measure`: what an audit finds, tried on the demo model."""
    import replay_measure

    return replay_measure.run(options)


# ---------------------------------------------------------------- the report


def finish(options, facts, alarms):
    """Tell what was found, write the JSON document. Returns the exit status."""
    tell_chain(options, facts["chain"])
    if "tokens" in facts:
        tell_verdict(options, facts)
    for alarm in alarms:
        say(options, f"ALARM {alarm}")
    say(options, f"{len(alarms):,} alarms" if alarms else "no alarm")
    document = {"tool": "replay_audit", "version": VERSION, "verb": options.verb}
    write(options.json, document | facts | {"alarms": alarms})
    return REFUSED if alarms else DONE


def write(path, document):
    """Write a JSON document to a file, - for standard output, or not at all for None. OSError."""
    text = json.dumps(document, indent=1) + "\n"
    if path == "-":
        print(text, end="")
    elif path:
        pathlib.Path(path).write_text(text, "ascii")


def say(options, line):
    """A line for the reader, unless JSON goes there."""
    if options.json != "-":
        print(line)


def tell_chain(options, facts):
    """What the chain proves of the log."""
    for head in facts["heads"]:
        name = f"lease {head['lease']}" if head["lease"] else "the head"
        state = "from the beginning on" if head["is_whole"] else "and not from the beginning on"
        say(options, f"{name}: {head['exchanges']:,} exchanges lead to {head['head']}, {state}")
    text = f"{facts['verified']:,} of {facts['entries']:,} exchanges verified"
    text += f"; not verified: {facts['cut']:,} cut off, {facts['unlinked']:,} lead to no head yet"
    say(options, f"{text}; {facts['refused']:,} refused before they began")


def tell_verdict(options, facts):
    """What the sample says."""
    tokens, rule, hidden = facts["tokens"], facts["rule"], facts["unnoticed"]
    sample, detection = facts["sample"], facts["detection"]
    say(options, f"sample: {sample['exchanges']:,} exchanges of {tokens['all']:,} tokens")
    for ending, count in sorted(facts["endings"].items()):
        word = "" if ending in AUDITED else ", not audited: the proxy's or the gate's word"
        say(options, f"  ended as {ending}: {count:,}{word}")
    low, high = tokens["refused_interval"]
    text = f"tokens equal: {tokens['equal']:,}; within {rule['tolerance']:.3g} logits: "
    text += f"{tokens['within']:,}; refused: {tokens['refused']:,} "
    say(options, f"{text}({low:.2%} to {high:.2%}), {tokens['allowed']:,} are no alarm")
    if facts["margins"]:
        parts = (f"{share:.1%}: {margin:.2g}" for share, margin in facts["margins"].items())
        say(options, f"margins of those within, at most, in logits: {', '.join(parts)}")
    low, high = hidden["within_interval"]
    text = f"unnoticed, at the worst: {hidden['all']:.4f} bits a token: {hidden['within']:.4f} "
    text += f"({low:.4f} to {high:.4f}, empirical Bernstein) among accepted tokens, "
    say(options, f"{text}{hidden['refused']:.4f} by up to {hidden['rate']:.2%} refused ones")
    text = f"in the whole log: {hidden['log'] / 8:,.0f} bytes; by endings that are not audited"
    say(options, f"{text}: {hidden['unaudited_endings'] / 8:,.0f} bytes")
    bits, most = detection["bits"]
    text = f"an engine that chooses all tokens of an answer is found after {bits / 8:,.0f} bytes "
    say(options, f"{text}on average, {most / 8:,.0f} with a probability of {rule['confidence']:g}")


# ---------------------------------------------------------------- the command line

LOG = "log head lease "
SCORING = LOG + owner.OWN + "vocabulary sample confidence json "
VERBS = {  # verb: function, help, flags
    "check": (
        run_check,
        "the log against the heads that the owner has",
        LOG + "ledger witness json",
    ),
    "audit": (
        run_audit,
        "that, and a sample of it re-scored",
        SCORING + "calibration exact false-alarm",
    ),
    "calibrate": (
        run_calibrate,
        "choose the tolerance, by a trusted log",
        SCORING + "refused output",
    ),
    "measure": (run_measure, "what an audit finds, on the demo model", "tokens json"),
}
FLAGS = owner.FLAGS | {  # flag: type, default, help
    "log": (str, None, "the log that muproxy wrote"),
    "head": (str, None, "the chain's head, as owner.py status says it"),
    "lease": (str, None, "only the closing statement of this lease"),
    "ledger": (str, None, "file of the ledger, which keeps closing statements"),
    "vocabulary": (muproxy.read_vocabulary, None, "token table (.vocab) of the model"),
    "sample": (float, 0.1, "share of the exchanges that is drawn (0.1)"),
    "calibration": (read_calibration, None, "file that calibrate wrote"),
    "exact": (bool, False, "every token has to be equal"),
    "false-alarm": (float, 0.01, "probability that an honest log is an alarm (0.01)"),
    "confidence": (float, 0.95, "of what is estimated (0.95)"),
    "refused": (float, 0.001, "share of honest tokens that may be refused (0.001)"),
    "output": (str, None, "where the calibration goes"),
    "tokens": (int, 10000, "honest tokens to score, of each kind (10000)"),
    "json": (str, None, "write JSON to a file; - for standard output"),
}


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = muproxy.make_parser("replay_audit", __doc__, VERBS, FLAGS, {})
    try:
        return muproxy.run_command(parser, argv)
    except ModuleNotFoundError as error:
        print(f"replay_audit: error: {error.name} is not installed: pip install .", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
