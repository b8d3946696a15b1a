"""Statistics of the replay audit: margins and their codes, exact tests of rates, and how many bits
an engine can hide that keeps within the tolerance.

The margin of a token is by how much another one had the better score: its logit and the noise of
the seed times the temperature, so that margins count in logits (arXiv 2511.20621). An honest
engine's tokens have small ones, from sums that another machine or batch adds up in another order.
An engine that hides data picks among the tokens that the audit would accept, so each of its tokens
carries at most the logarithm of their number (arXiv 2511.02620).
"""

import math

STEPS = 8  # codes for each factor of 2 of a margin
ZERO = 128  # the code of a margin of 1; 0 is no margin at all, 255 also all above
LARGEST = 254  # the last code that has an upper end
SMALL = 1e-9  # of a step: what rounding may do to a boundary
BISECTIONS = 100
NEGLIGIBLE = 1e-18  # a term of a sum, in parts of it


def margin_below(code):
    """What a margin of this code is below: the upper end of its step. 0 for code 0."""
    return 2 ** ((code + 1 - ZERO) / STEPS) if code else 0.0


def code_within(tolerance):
    """The least code whose whole step takes in this tolerance, so that it is rounded up."""
    if tolerance <= 0:
        return 0
    step = math.ceil(STEPS * math.log2(tolerance) + ZERO - 1 - SMALL)
    return min(max(step, 1), LARGEST)


# ---------------------------------------------------------------- rates


def binomial_tail(count, tries, rate):
    """The probability of `count` or more of `tries` independent events, each of this rate."""
    if count <= 0:
        return 1.0
    if count > tries or rate <= 0:
        return 0.0
    if rate >= 1:
        return 1.0
    if count <= tries * rate:  # the shorter sum
        return 1.0 - binomial_tail(tries - count + 1, tries, 1 - rate)
    term = math.lgamma(tries + 1) - math.lgamma(count + 1) - math.lgamma(tries - count + 1)
    term = math.exp(term + count * math.log(rate) + (tries - count) * math.log1p(-rate))
    total, odds = 0.0, rate / (1 - rate)
    while count <= tries and term > total * NEGLIGIBLE:
        total += term
        term *= odds * (tries - count) / (count + 1)
        count += 1
    return min(total, 1.0)


def least_surprising(tries, rate, chance):
    """The least number of events whose probability, or that of more, is at most `chance`.

    So many are an alarm that is false with at most that probability. With a rate of 0 it is 1.
    """
    low, high = 0, tries + 1  # of `high` it is true
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_tail(middle, tries, rate) <= chance:
            high = middle
        else:
            low = middle
    return high


def upper_rate(count, tries, confidence):
    """The highest rate at which `count` events or fewer are not rarer than 1 - confidence.

    One side of the interval of Clopper and Pearson (1934), which is exact.
    """
    if count >= tries:
        return 1.0
    return bisect(lambda rate: binomial_tail(count + 1, tries, rate) < confidence)


def lower_rate(count, tries, confidence):
    """The other side: the lowest rate at which `count` events or more are not rarer than that."""
    return 1 - upper_rate(tries - count, tries, confidence)


def rate_interval(count, tries, confidence):
    """Both sides (low, high) of Clopper's and Pearson's interval, each with half of the error."""
    if not tries:
        return 0.0, 1.0
    side = (1 + confidence) / 2
    return lower_rate(count, tries, side), upper_rate(count, tries, side)


def bisect(is_below):
    """The point of [0, 1] up to which is_below(x) is true."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high


def mean_interval(values, most, confidence):
    """(mean, low, high) of independent values from 0 to `most`, whatever their distribution.

    Empirical Bernstein bound, Maurer and Pontil (2009), theorem 4; each side gets half of the
    error. It needs two values; with fewer the interval is all that is possible.
    """
    count = len(values)
    if count < 2:
        return (values[0] if values else 0.0), 0.0, float(most)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    weight = math.log(4 / (1 - confidence))  # ln(2 / d), with d a half of the error
    beside = math.sqrt(2 * variance * weight / count) + 7 * most * weight / (3 * (count - 1))
    return mean, max(0.0, mean - beside), min(float(most), mean + beside)


# ---------------------------------------------------------------- tolerance


def tokens_needed(share, confidence):
    """How many honest tokens it takes to say that at most this share is refused."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-share))


def choose_tolerance(margins, share, confidence):
    """(tolerance, how many of the margins are above it): the least that honest tokens allow.

    margins: of an honest engine, in logits. With this confidence at most the given share of its
    tokens has a larger one (Clopper and Pearson). ValueError if there are too few to say that.
    """
    ordered = sorted(margins, reverse=True)
    if upper_rate(0, len(ordered), confidence) > share:
        needed = tokens_needed(share, confidence)
        raise ValueError(f"{len(ordered):,} tokens are too few: {needed:,} or more are needed")
    low, high = 0, len(ordered)  # refused: so many can be, so many can't
    while high - low > 1:
        middle = (low + high) // 2
        if upper_rate(middle, len(ordered), confidence) <= share:
            low = middle
        else:
            high = middle
    tolerance = ordered[low]
    return tolerance, sum(margin > tolerance for margin in ordered)


# ---------------------------------------------------------------- hidden bits


def entropy(rate):
    """Bits for each token that it takes to say which tokens are of a kind that has this rate."""
    if not 0 < rate < 1:
        return 0.0
    return -rate * math.log2(rate) - (1 - rate) * math.log2(1 - rate)


def refused_bits(rate, size):
    """Bits a token that refused tokens of this rate can carry: any of `size` ids, at any places.

    At more than a half of the tokens, no rate leaves fewer bits than log2(size) a token.
    """
    most = math.log2(size)
    return most if rate >= 0.5 else min(most, rate * most + entropy(rate))


def admissible_bits(counts, size):
    """For each token the bits that a choice among the accepted ones can carry.

    counts: how many tokens were within the tolerance, as a code: the largest stands for all.
    """
    return [math.log2(size if count == 255 else max(count, 1)) for count in counts]


def quantiles(values, shares):
    """{share: the value that so large a share of them does not exceed}; {} of none."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {share: ordered[min(last, int(share * len(ordered)))] for share in shares if ordered}


def until_drawn(share, confidence):
    """(mean, with this confidence at most): exchanges of a kind until one is in the sample.

    share: of the exchanges that is drawn, each as likely as any other.
    """
    if share >= 1:
        return 1.0, 1
    return 1 / share, math.ceil(math.log(1 - confidence) / math.log1p(-share))
