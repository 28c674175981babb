"""What steps and guesses cost, learned from how long they take, and how many guesses pay.

In: of each step its rows, its distinct experts and its seconds; of each guess its steps, its tokens and its seconds;
what came true. Out: how many tokens to guess for each request. Must never know: requests' tokens, tensors.

Model: a step of `n` rows takes `a + b n + c d(n)` seconds, with `d(n)` distinct experts in a layer; guessing takes
`e + f s + g m` with `s` steps of the draft and `m` tokens computed by it. The coefficients are not negative, fitted by
least squares in which older measurements fade. What has never been tried, or not for long, costs nothing: so it is
tried, and then it is known; the first guesses, which are slow, do not count. Steps without guesses are asked for now
and then too. The i-th guess for a request comes true with probability p^i.

Choice: the rows of a step are shared by all requests, so guesses are chosen together. In order of their chance to come
true they are added one by one, and the number is taken that gives most tokens in a second, none included. A request
whose guesses are never worth it gets one now and then, or nobody would see that its text has changed. Whether it pays
to look for guesses at all is measured as a whole: see `looking`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from amalgam.engine.speculation.looking import Looking

_FADE = 0.98  # of a measurement's weight, with each later one
_MAX_SURPRISE = 4.0
_EARLY = 64  # measurements, after each of which the coefficients are found anew; then after every
_SOLVE_EVERY = 8  # as that takes as long as ten choices
_RIDGE = 1e-4  # how firmly a coefficient that nothing is known of is held at 0
_FIRST_CHANCE = 0.7  # that a guess comes true, as long as nothing is known
_PRIOR_WEIGHT = 2.0  # guesses of a request that count as much as those of all others
_CHANCE_FADE = 0.9
_NEWEST = 0.05  # part of one request's guess in the chance of all
_PROBE_STEPS = 32  # without a guess, then comes one
_MAX_CHANCE = 0.98
_INSTANT = 1e-9  # seconds; nothing is divided by less
_PLAIN_STEPS = 32  # with guesses, then comes one without
_FIRST_STEPS = 16  # of which every other one is without
_COLD_GUESSES = 2  # the first ones, which find nothing in a cache and no buffers
_RETRY_STEPS = 256  # without a guess, then what guessing has cost is no reason against one
_SIZES = range(64)  # bit lengths of numbers of rows


class Fit:
    """y as a sum of features with coefficients that are not negative.

    Once some values are known, one that is far above what they let expect counts as a few times that: a machine that
    stands still for a while says nothing of the next step, and one that has become slower is believed soon.

    Args:
        num_features: beside the constant.
    """

    def __init__(self, num_features: int) -> None:
        self._moments = [[0.0] * (num_features + 1) for _ in range(num_features + 1)]
        self._products = [0.0] * (num_features + 1)
        self._coefficients: tuple[float, ...] | None = None
        self.num_seen = 0

    def add(self, features: Sequence[float], y: float) -> None:
        if self.num_seen >= _FIRST_STEPS and (expected := self.predict(*features)) > 0:
            y = min(y, _MAX_SURPRISE * expected)
        row = (1.0, *features)
        for place, feature in enumerate(row):  # so few that arrays would take longer
            self._moments[place] = [
                _FADE * moment + feature * other for moment, other in zip(self._moments[place], row, strict=True)
            ]
            self._products[place] = _FADE * self._products[place] + feature * y
        self.num_seen += 1
        if self.num_seen < _EARLY or self.num_seen % _SOLVE_EVERY == 0:
            self._coefficients = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The constant first. Any thread, while another one adds."""
        found = self._coefficients
        if found is None:
            found = self._coefficients = self._solve()
        return found

    def predict(self, *features: float) -> float:
        constant, *slopes = self.coefficients
        return constant + sum(slope * feature for slope, feature in zip(slopes, features, strict=True))

    def _solve(self) -> tuple[float, ...]:
        all_moments, products = np.array(self._moments), np.array(self._products)
        found = np.zeros(len(products))
        used = np.flatnonzero(np.diag(all_moments) > 0)
        while len(used):
            moments = all_moments[np.ix_(used, used)]
            held = _RIDGE * np.diag(moments) * (used > 0)  # the constant takes what others do not explain
            values = np.linalg.solve(moments + np.diag(held), products[used])
            if values.min() >= 0:
                found[used] = values
                break
            used = np.delete(used, values.argmin())
        return tuple(found.tolist())


def distinct_experts(num_experts: int, num_active: int, num_rows: int) -> float:
    """Experts of a layer that rows need which choose independently of each other: `E (1 - (1 - k/E)^n)`."""
    unread: float = (1 - num_active / num_experts) ** num_rows
    return num_experts * (1 - unread)


class Experts:
    """How many distinct experts of a layer `n` rows need.

    If each row chose on its own it would be `distinct_experts`. Rows of one text choose alike; by how much less it is,
    is measured, for each power of two of rows.

    Args:
        num_experts, num_active: E and k; 0: the model has none.
    """

    def __init__(self, num_experts: int, num_active: int) -> None:
        self._num_experts, self._num_active = num_experts, num_active
        self._shares: dict[int, float] = {}  # bit length of the number of rows → what was measured by what was expected
        self._expected: list[float] = []  # for each number of rows, if each row chose on its own
        self._nearest: dict[int, int] = {}  # bit length → the one next to it whose share is known

    def add(self, num_rows: int, num_distinct: float) -> None:
        if expected := self._independent(num_rows):
            size = num_rows.bit_length()
            share, before = num_distinct / expected, self._shares.get(size)
            self._shares[size] = share if before is None else before + 0.1 * (share - before)
            if before is None:
                self._nearest = {other: min(self._shares, key=lambda known: abs(known - other)) for other in _SIZES}

    def predict(self, num_rows: int) -> float:
        expected = self._independent(num_rows)
        return expected * self._shares[self._nearest[num_rows.bit_length()]] if self._shares else expected

    def _independent(self, num_rows: int) -> float:
        if not self._num_experts:
            return 0.0
        while len(self._expected) <= num_rows:
            self._expected.append(distinct_experts(self._num_experts, self._num_active, len(self._expected)))
        return self._expected[num_rows]


class Candidate(NamedTuple):
    """A request that could be given guesses."""

    request_id: int
    num_tokens: int  # at most so many
    num_missing: int = 0  # tokens that the draft would have to compute first
    num_left: int = 1  # tokens that may still come, over which that is spread


class _Guess(NamedTuple):
    """One token that could be guessed.

    Attributes:
        chance: that it comes true, which takes those of the request before it to.
        place: among the request's guesses, from 1 on.
    """

    chance: float
    place: int
    candidate: Candidate


_likelihood = itemgetter(0)


@dataclass
class _Record:
    """What has come of one request's guesses; both fade."""

    num_tested: float = 0.0
    num_true: float = 0.0
    num_idle: int = 0  # times in a row that it was given none


class CostModel:
    """Says how many guesses pay. In the step thread, but for `describe`.

    Args:
        num_experts, num_active: of a layer of the model, and how many of them a token needs; 0: it has none.
    """

    def __init__(self, num_experts: int = 0, num_active: int = 0) -> None:
        self._step = Fit(2)
        self._guess = Fit(2)
        self._experts = Experts(num_experts, num_active)
        self._records: dict[int, _Record] = {}
        self._chance = _FIRST_CHANCE
        self._num_guessing = 0  # steps since the last one without guesses
        self._num_cold = 0  # guesses so far that do not count
        self._num_untried = 0  # steps since the last guess
        self._looking = Looking()

    def rests(self) -> bool:
        """Whether the step that begins goes without guesses: none need be looked for. To be asked once for each."""
        return self._looking.rests()

    def add_step(self, num_rows: int, seconds: float, num_distinct: float | None = None) -> None:
        """A step of streams and guesses alone has been computed.

        Args:
            num_distinct: experts of a layer that it needed, the mean over layers; None: nobody has counted.
        """
        if num_distinct is not None:
            self._experts.add(num_rows, num_distinct)
        else:
            num_distinct = self._experts.predict(num_rows)
        self._step.add((num_rows, num_distinct), seconds)

    def add_plain(self, num_streams: int, seconds: float) -> None:
        """A step has been computed that had no guesses; what looking for some took is left out."""
        if self._step.num_seen >= _FIRST_STEPS:
            self._looking.add_plain(num_streams, self._clipped(num_streams, seconds))

    def add_trial(self, num_streams: int, num_rows: int, num_given: int, seconds: float) -> None:
        """A step for which guesses were looked for is over, of streams alone.

        Args:
            num_given: tokens that it gave.
            seconds: that it took with all that would not have been without guesses.
        """
        if self._step.num_seen >= _FIRST_STEPS:
            self._looking.add_trial(num_streams, num_given, self._clipped(num_rows, seconds))

    def _clipped(self, num_rows: int, seconds: float) -> float:
        """A step's time; a machine that stood still meanwhile says nothing."""
        return min(seconds, _MAX_SURPRISE * self.seconds(num_rows))

    def add_guess(self, num_steps: int, num_tokens: int, seconds: float) -> None:
        """Guesses have been made.

        Args:
            num_steps: one after another, of the draft: the longest guess.
            num_tokens: that the draft has computed.
        """
        self._num_untried = 0
        if self._num_cold < _COLD_GUESSES:
            self._num_cold += 1
        else:
            self._guess.add((num_steps, num_tokens), seconds)

    def add_outcome(self, request_id: int, num_proposed: int, num_true: int) -> None:
        """So many of a request's guesses came true, and the next one, if there was any, did not."""
        record = self._records.setdefault(request_id, _Record())
        num_tested = min(num_true + 1, num_proposed)
        record.num_tested = _CHANCE_FADE * record.num_tested + num_tested
        record.num_true = _CHANCE_FADE * record.num_true + num_true
        for outcome in [1.0] * num_true + [0.0] * (num_tested - num_true):
            self._chance += _NEWEST * (outcome - self._chance)

    def forget(self, request_id: int) -> None:
        """A request has ended."""
        self._records.pop(request_id, None)

    def chance(self, request_id: int) -> float:
        """That a guess for the request comes true, if those before it do."""
        record = self._records.get(request_id, _Record())
        chance = (_PRIOR_WEIGHT * self._chance + record.num_true) / (_PRIOR_WEIGHT + record.num_tested)
        return min(chance, _MAX_CHANCE)

    def seconds(self, num_rows: int) -> float:
        """What a step of so many rows takes."""
        constant, per_row, per_expert = self._step.coefficients
        return constant + per_row * num_rows + per_expert * self._experts.predict(num_rows)

    def choose(self, num_rows: int, num_streams: int, candidates: Sequence[Candidate]) -> dict[int, int]:
        """Request id → how many tokens to guess for it; requests that get none are left out.

        Args:
            num_rows: of the step without guesses.
            num_streams: requests that get a token from it.
        """
        if self._num_guessing >= (1 if self._step.num_seen < _FIRST_STEPS else _PLAIN_STEPS):
            self._num_guessing = 0
            return {}
        guesses = self._likeliest_first(candidates)
        chosen: dict[int, int] = {}
        for guess in guesses[: self._num_best(num_rows, num_streams, guesses)]:
            chosen[guess.candidate.request_id] = guess.place
        self._probe(chosen, num_rows, num_streams, candidates)
        self._num_guessing = self._num_guessing + 1 if chosen else 0
        return chosen

    def describe(self) -> Mapping[str, float]:
        """What is known: coefficients in seconds, the chance of a guess for a new request, and `gain`: tokens that come
        with guesses in the time of one that comes without.
        """
        constant, per_row, per_expert = self._step.coefficients
        return {
            "step_seconds": constant,
            "step_seconds_per_row": per_row,
            "step_seconds_per_expert": per_expert,
            "guess_seconds": self._guess.coefficients[0],
            "guess_seconds_per_step": self._guess.coefficients[1],
            "guess_seconds_per_token": self._guess.coefficients[2],
            "chance": self._chance,
            "gain": self._looking.gain,
        }

    def _likeliest_first(self, candidates: Sequence[Candidate]) -> list[_Guess]:
        """Every guess that can be made. Those of a request are in their order."""
        guesses = []
        for candidate in candidates:
            chance = self.chance(candidate.request_id)
            guesses += [_Guess(chance**place, place, candidate) for place in range(1, candidate.num_tokens + 1)]
        return sorted(guesses, key=_likelihood, reverse=True)

    def _num_best(self, num_rows: int, num_streams: int, guesses: Sequence[_Guess]) -> int:
        """With how many of the guesses, from the first on, a step gives most tokens in a second."""
        constant, per_step, per_token = self._guess.coefficients
        given, longest, num_computed = float(num_streams), 0, 0.0
        num_best, most = 0, given / max(self.seconds(num_rows), _INSTANT)
        for count, (chance, place, candidate) in enumerate(guesses, 1):
            given += chance
            if place > longest:
                longest = place
            num_computed += _num_first(candidate) if place == 1 else 1.0
            seconds = self.seconds(num_rows + count) + constant + per_step * longest + per_token * num_computed
            if given > most * seconds:
                num_best, most = count, given / max(seconds, _INSTANT)
        return num_best

    def _probe(self, chosen: dict[int, int], num_rows: int, num_streams: int, candidates: Sequence[Candidate]) -> None:
        """One guess for each request that has not been given any for long, if one that is right would pay."""
        self._num_untried += 1
        due = []
        for one in candidates:
            record = self._records.setdefault(one.request_id, _Record())
            record.num_idle = 0 if one.request_id in chosen else record.num_idle + 1
            if record.num_idle >= _PROBE_STEPS:
                due.append(one)
        if not due:
            return
        before, after = self.seconds(num_rows), self.seconds(num_rows + 1)
        more = after - before + (self._guess.predict(1, 1) if self._num_untried < _RETRY_STEPS else 0.0)
        for one in due:
            self._records[one.request_id].num_idle = 0
            if more * num_streams < before:  # a token of the step takes so long
                chosen[one.request_id] = 1


def _num_first(one: Candidate) -> float:
    """Tokens that a draft computes for a request's first guess: what it lacks of the request, a prompt spread."""
    at_once = min(one.num_missing, 2)
    return max(at_once + (one.num_missing - at_once) / max(one.num_left, 1), 1.0)
