"""The decoder's answers, whatever runs beside them and whenever they came.

In float32 they are transformers' own, token for token; in bfloat16, where a batch of another shape
rounds otherwise, the same requests at the same steps give the same bits again.
"""

import collections
import functools
import hashlib
import random
import unittest

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import muenclave
from tests import support
from tests.test_engine import decoder, demo_tokenizer, heard, rebuilt, reference, tiny

# A model under test: transformers' own, ours of the same weights, ids of a random prompt of this
# length, and what decides the lengths of its prompts: the chunks in which they are taken.
Subject = collections.namedtuple("Subject", "theirs ours prompt chunk")

TINY = {  # of 512 positions, so that a prompt takes many small chunks
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gpt_neox": {},
}
SMALL_CHUNK = 16
TOKENS = 20  # of an answer, at most
MARGIN = 1e-3  # logits between the best token and the next: no rounding of float32 decides
SHORT = (1, 2, 5, 9, 14)  # tokens of a prompt


def setUpModule():
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)


def random_ids(draw, length):
    """Ids that a tiny model knows."""
    return [draw.randrange(128) for _ in range(length)]


def demo_ids(draw, length):
    """Ids of so many tokens of the text that the demo model was trained on."""
    text = demo_text()
    start = draw.randrange(len(text) - length)
    return text[start : start + length]


@functools.cache
def demo_text():
    """The ids of all that the demo model has read as plain text."""
    texts, _ = support.demo.corpus()
    return demo_tokenizer()("\n".join(texts))["input_ids"]


@functools.cache
def subject(name):
    """The Subject of this name, in float32."""
    if name == "demo":
        theirs = reference(support.demo_model("float32"))
        return Subject(theirs, rebuilt(theirs), demo_ids, muenclave.CHUNK)
    theirs = tiny(name, max_position_embeddings=512, **TINY[name])
    return Subject(theirs, rebuilt(theirs), random_ids, SMALL_CHUNK)


@functools.cache
def generated(name, ids):
    """(ids, how it ended) of an answer as transformers' generate gives it, from a tuple of ids.

    None if anywhere in it two tokens are so close that rounding could decide between them.
    """
    model, tokens = subject(name).theirs, torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    with torch.inference_mode():
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    best = torch.cat(found.scores).topk(2).values
    if float((best[:, 0] - best[:, 1]).min()) < MARGIN:
        return None
    answer = found.sequences[0, len(ids) :].tolist()
    if answer[-1] == model.generation_config.eos_token_id:
        return answer[:-1], "stop"
    return answer, "length"


def drawn(name, draw, lengths, prefix=()):
    """A clear request for each length, after the same ids; lengths count what follows these."""
    requests = []
    for length in lengths:
        ids = None
        while ids is None or generated(name, ids) is None:
            ids = (*prefix, *subject(name).prompt(draw, length))
        requests.append({"ids": list(ids), "max_new_tokens": TOKENS})
    return requests


@functools.cache
def mixed(name):
    """32 requests, most of them short, some of more than a chunk."""
    draw, chunk = random.Random("mixed"), subject(name).chunk
    return drawn(name, draw, [draw.choice((*SHORT, chunk // 2, chunk + 5)) for _ in range(32)])


def played(batch, arrivals, cancels=()):
    """What a decoder says to requests that come before these of its steps, [(step, request)], and
    to cancels, [(step, number of a request)]: {number of a request: (ids, how it ended)}.
    """
    news = [(step, 0, {"seed": 0, "slot": n} | request) for n, (step, request) in arrivals]
    news += [(step, 1, {"cancel": number}) for step, number in cancels]
    news.sort(key=lambda entry: entry[:2])
    step = 0
    while news or batch.streams:
        if not batch.streams:  # nothing to do until somebody comes
            step = max(step, news[0][0])
        while news and news[0][0] <= step:
            batch.take(news.pop(0)[2])
        batch.step()
        step += 1
    found = heard(batch.out)
    batch.out.clear()
    return found


def at_once(requests):
    """Arrivals of requests that all come before the first step."""
    return list(enumerate((0, request) for request in requests))


def spread(requests, draw, most=3):
    """Arrivals of requests one after another, a few steps between them, or none."""
    steps, step = [], 0
    for request in requests:
        steps.append((step, request))
        step += draw.randrange(most + 1)
    return list(enumerate(steps))


class Case(unittest.TestCase):
    """Helper: tiny models take their prompts in small chunks, so that short ones have several."""

    def setUp(self):
        self.addCleanup(setattr, muenclave, "CHUNK", muenclave.CHUNK)

    def use(self, name):
        """The Subject of this name, whose chunks it is that prompts are taken in from now on."""
        muenclave.CHUNK = subject(name).chunk
        return subject(name)


class Float32(Case):
    """Greedy answers are those of transformers' generate, one prompt at a time."""

    MODELS = ("demo", *TINY)

    def check(self, name, found, requests, cancelled=()):
        """All are whole and right; those that were cancelled are right as far as they got."""
        self.assertEqual(sorted(found), list(range(len(requests))))
        for number, request in enumerate(requests):
            wanted, (ids, ending) = generated(name, tuple(request["ids"])), found[number]
            if number in cancelled and ending == "cancelled":
                self.assertEqual(ids, wanted[0][: len(ids)], number)
            else:
                self.assertEqual((ids, ending), wanted, number)

    def test_batches(self):
        for name in self.MODELS:
            for size in (1, 8, 32):
                with self.subTest(model=name, size=size):
                    batch, requests = decoder(self.use(name).ours, slots=size), mixed(name)[:size]
                    self.check(name, played(batch, at_once(requests)), requests)

    def test_joined_late(self):
        for name in self.MODELS:
            with self.subTest(model=name):
                batch, requests = decoder(self.use(name).ours, slots=16), mixed(name)[:16]
                arrivals = spread(requests, random.Random("late"))
                self.check(name, played(batch, arrivals), requests)

    def test_more_requests_than_slots(self):
        for name in self.MODELS:
            with self.subTest(model=name):
                batch, requests = decoder(self.use(name).ours, slots=3), mixed(name)[8:24]
                arrivals = spread(requests, random.Random("more"))
                self.check(name, played(batch, arrivals), requests)
                again = played(batch, at_once(requests[::-1]))  # in rows that others have used
                self.check(name, again, requests[::-1])

    def test_cancelled_neighbours(self):
        """While they wait, while their prompt is taken in, and in the middle of their answers."""
        for name in self.MODELS:
            with self.subTest(model=name):
                draw, requests = random.Random("cancelled"), mixed(name)[12:]
                batch, arrivals = decoder(self.use(name).ours, slots=5), spread(requests, draw)
                cancelled = range(0, len(requests), 2)
                cancels = [(arrivals[n][1][0] + draw.randrange(12), n) for n in cancelled]
                found = played(batch, arrivals, cancels)
                self.check(name, found, requests, cancelled)
                cut = [ids for ids, ending in found.values() if ending == "cancelled"]
                self.assertGreater(len(cut), 4)
                self.assertIn([], cut)
                self.assertTrue(any(cut))

    def test_long_prompts(self):
        """Of whole chunks and one more or less, beside short ones that have begun."""
        for name in self.MODELS:
            with self.subTest(model=name):
                model, draw = self.use(name), random.Random("long")
                chunk = model.chunk
                lengths = [2, 9]
                lengths += [chunk * n + more for n in (1, 2, 3) for more in (-1, 0, 1)]
                requests = drawn(name, draw, lengths)
                for slots in (3, 12):
                    batch = decoder(model.ours, slots=slots)
                    self.check(name, played(batch, spread(requests, draw)), requests)

    def test_shared_prefixes(self):
        """Prompts of several users that begin alike, at the same time and after one another."""
        for name in self.MODELS:
            with self.subTest(model=name):
                model, draw = self.use(name), random.Random("shared")
                requests = self.sharing(name, draw)
                for slots, most in ((2, 0), (4, 2), (16, 20)):
                    batch = decoder(model.ours, slots=slots)
                    arrivals = spread(requests, draw, most)
                    self.check(name, played(batch, arrivals), requests)
                    cancelled = range(0, len(requests), 3)
                    cancels = [(arrivals[n][1][0] + draw.randrange(6), n) for n in cancelled]
                    found = played(batch, arrivals, cancels)
                    self.check(name, found, requests, cancelled)

    def sharing(self, name, draw):
        """Requests of users, in the order in which they come, whose prompts begin alike: of whole
        chunks and not, one within another, the same twice, and a talk that goes on.
        """
        chunk = subject(name).chunk
        (exact,) = drawn(name, draw, [2 * chunk])
        (system,) = drawn(name, draw, [3], exact["ids"])
        prefix = system["ids"]
        requests = [system | {"user": 1}]
        for length in (1, 4, chunk):
            after = drawn(name, draw, [length, length + 2], prefix)
            requests += [after[0] | {"user": 1}, after[1] | {"user": 2}]
        whole = drawn(name, draw, [1, chunk - 1], prefix[: 2 * chunk])
        short = drawn(name, draw, [1, chunk - 1], prefix[:chunk])
        other = drawn(name, draw, [chunk + 1], prefix[: chunk - 1])  # shares no whole chunk
        requests += [request | {"user": 1} for request in (*whole, *short, *other)]
        requests += [exact | {"user": 1}, system | {"user": 1}, system | {"user": 2}, requests[1]]
        talk = [*prefix, *generated(name, tuple(prefix))[0]]
        return requests + [request | {"user": 1} for request in drawn(name, draw, [3], talk)]


class Bits(TorchDispatchMode):
    """The bits of all logits that torch computes within it: a digest of each tensor that is as
    wide as the vocabulary, in their order, whatever the code that asks for them.
    """

    def __init__(self, width):
        super().__init__()
        self.width, self.digests = width, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        is_new = "empty" in str(function)  # memory that holds nothing yet
        is_wide = isinstance(result, torch.Tensor) and result.shape[-1:] == (self.width,)
        if is_wide and not is_new:
            data = result.detach().contiguous().view(torch.uint8).numpy().tobytes()
            self.digests.append(hashlib.sha256(data).hexdigest())
        return result


class Bfloat16(Case):
    """The same requests at the same steps give the same answers, to the last bit of each logit."""

    MODELS = ("demo", "llama", "gpt_neox")
    VOCABULARY = {"demo": 768}  # 136 of the others: no other size that occurs in them
    SLOTS = 6

    @classmethod
    @functools.cache
    def ours(cls, name):
        """Our model of this name in bfloat16."""
        if name == "demo":
            return rebuilt(reference(support.demo_model("bfloat16")))
        fields = {"max_position_embeddings": 512, "vocab_size": 136} | TINY[name]
        return rebuilt(tiny(name, **fields).to(torch.bfloat16), dtype="bfloat16")

    def schedule(self, name):
        """(arrivals, cancels): some greedy and some sampled, short and long, more than slots."""
        draw, requests = random.Random(f"bits {name}"), []
        shared = subject(name).prompt(draw, subject(name).chunk + 3)
        for number in range(16):
            length = draw.choice((*SHORT, subject(name).chunk + 7))
            ids = shared * (number % 4 == 3) + subject(name).prompt(draw, length)
            request = {"ids": ids, "seed": number, "max_new_tokens": draw.randrange(5, 40)}
            options = {"temperature": draw.choice((0, 0.8, 1.5)), "top_p": draw.choice((1, 0.9))}
            requests.append(request | options | {"user": number % 2})
        arrivals = spread(requests, draw, 5)
        cancels = [(arrivals[n][1][0] + draw.randrange(12), n) for n in (2, 7, 12)]
        return arrivals, cancels

    def recorded(self, name, arrivals, cancels):
        """({number: (ids, ending)}, digests of the logits) of a decoder that is new."""
        batch = decoder(self.ours(name), slots=self.SLOTS)
        with Bits(self.VOCABULARY.get(name, 136)) as bits:
            found = played(batch, arrivals, cancels)
        return found, bits.digests

    def test_the_same_schedule_again(self):
        for name in self.MODELS:
            with self.subTest(model=name):
                self.use(name)
                arrivals, cancels = self.schedule(name)
                found, bits = self.recorded(name, arrivals, cancels)
                self.assertGreater(len(bits), len(arrivals))
                garbage = [torch.full((1 << 18,), float("nan")) for _ in range(64)]
                del garbage  # what memory is taken next holds other bits than at first
                again, bits_again = self.recorded(name, arrivals, cancels)
                self.assertEqual(again, found)
                same = sum(one == other for one, other in zip(bits, bits_again))
                self.assertEqual((len(bits_again), same), (len(bits), len(bits)))

    def test_another_schedule_has_other_bits(self):
        """So that what is compared above is what a schedule decides."""
        self.use("llama")
        arrivals, cancels = self.schedule("llama")
        _, bits = self.recorded("llama", arrivals, cancels)
        late = [(n, (step + 2 * (n == 9), request)) for n, (step, request) in arrivals]
        self.assertNotEqual(self.recorded("llama", late, cancels)[1], bits)

    def test_scored_by_the_same_schedule(self):
        """A replay that scores the answers finds each of their tokens the best, by no margin."""
        for name in self.MODELS:
            with self.subTest(model=name):
                self.use(name)
                arrivals, cancels = self.schedule(name)
                found, _ = self.recorded(name, arrivals, cancels)
                gone = {number for _, number in cancels}
                scored = []
                for number, (step, request) in arrivals:
                    score = {"score": {"ids": found[number][0], "tolerance": 0.0}}
                    scored.append((number, (step, request | (score if number not in gone else {}))))
                codes, _ = self.recorded(name, scored, cancels)
                for number, (ids, ending) in found.items():
                    if number in gone:
                        self.assertEqual(codes[number], found[number])
                        continue
                    margins, nears = codes[number][0][::2], codes[number][0][1::2]
                    self.assertEqual(codes[number][1], ending)
                    self.assertEqual(margins, [0] * (len(ids) + (ending == "stop")))
                    self.assertEqual(min(nears), 1)


if __name__ == "__main__":
    unittest.main()
