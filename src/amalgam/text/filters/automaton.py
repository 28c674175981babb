"""Many words and regular expressions, looked for at once in a text as it comes. Time linear in the text.

In: patterns; characters and where they stand. Out: what was found, and where something may have begun that the next
characters decide. Must never know: what happens to it.

No library for Python tells the second without backtracking, and without it a stream would have to be held back by the
longest match there could be, all the time. The patterns are one nondeterministic automaton. Its deterministic states
are made as texts need them, and forgotten when there are too many. A thread is a place where a match may have begun,
with its state. Of two threads in one state the earlier one goes on: whatever the later one finds, it finds too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from amalgam.text.filters.folding import IN_SPACED_WORD, IN_WORD, word_class
from amalgam.text.filters.syntax import Chain, Choice, Edge, Node, One, Repeat, Test

MAX_STEPS = 200_000  # of all deterministic states together
_OUTSIDE = 0  # the class of what is before a text, and behind it


@dataclass(frozen=True)
class Tag:
    """What a pattern finds.

    Attributes:
        label: in capitals: `EMAIL`.
        check: whether what matches is one indeed; of the compared characters.
    """

    label: str
    check: Callable[[str], bool] | None = None


class Span(NamedTuple):
    """What was found: `[start, end)` of the text."""

    start: int
    end: int
    tag: Tag


class _Step(NamedTuple):
    state: _State | None  # None: nothing can match any more
    ended_before: tuple[Tag, ...]  # matches that end before the character
    ended_with: tuple[Tag, ...]
    is_dead: bool  # nothing has begun, and nothing has ended


class _State:
    __slots__ = ("before", "is_checked", "kernel", "steps")

    def __init__(self, kernel: frozenset[int], before: int, *, is_checked: bool) -> None:
        self.kernel = kernel
        self.before = before  # class of the character before
        self.is_checked = is_checked
        self.steps: dict[str, _Step] = {}


class Automaton:
    """Patterns, put together. Shared by all texts, in any thread: what two of them make at once is equal.

    Args:
        words: as they are compared.
        borders: whether a word must have no letter or digit beside it, where its script has borders.
    """

    def __init__(
        self, words: Sequence[tuple[str, Tag]], patterns: Sequence[tuple[Node, Tag]], *, borders: bool
    ) -> None:
        self._empty: list[tuple[int, ...]] = []
        self._edges: list[tuple[str, int] | None] = []
        self._tests: list[tuple[Test, int] | None] = []
        self._letters: list[dict[str, int] | None] = []
        self._tags: list[Tag | None] = []
        roots = {False: self._node(), True: self._node()}
        for word, tag in words:
            self._add_word(word, tag, roots, borders)
        entries = [self._add(node, self._node(tag=tag)) for node, tag in patterns]
        bordered = self._node(edge=("<", roots[True]))
        self._start = self._node(empty=(roots[False], bordered, *entries))
        self._checked = self._leading_to_checks()
        self._states: dict[tuple[frozenset[int], int], _State] = {}
        self._num_steps = 0
        self.starts: tuple[_State, ...] = ()
        self._forget()

    def _node(self, empty: tuple[int, ...] = (), edge: tuple[str, int] | None = None, tag: Tag | None = None) -> int:
        self._empty.append(empty)
        self._edges.append(edge)
        self._tests.append(None)
        self._letters.append(None)
        self._tags.append(tag)
        return len(self._empty) - 1

    def _add_word(self, word: str, tag: Tag, roots: dict[bool, int], borders: bool) -> None:
        place = roots[borders and bool(word_class[word[0]] & IN_SPACED_WORD)]
        for letter in word:
            letters = self._letters[place]
            if letters is None:
                letters = self._letters[place] = {}
            if letter not in letters:
                letters[letter] = self._node()
            place = letters[letter]
        end = self._node(tag=tag)
        if borders and word_class[word[-1]] & IN_SPACED_WORD:
            end = self._node(edge=(">", end))
        self._empty[place] = (*self._empty[place], end)

    def _add(self, node: Node, following: int) -> int:
        """The node's beginning, where `following` comes behind it."""
        match node:
            case One(test):
                place = self._node()
                self._tests[place] = (test, following)
                return place
            case Edge(kind):
                return self._node(edge=(kind, following))
            case Chain(parts):
                for part in reversed(parts):
                    following = self._add(part, following)
                return following
            case Choice(options):
                return self._node(empty=tuple(self._add(option, following) for option in options))
            case Repeat(part, least, most):
                place = following
                if most is None:
                    place = self._node()
                    self._empty[place] = (self._add(part, place), following)
                else:
                    for _ in range(most - least):
                        place = self._node(empty=(self._add(part, place), following))
                for _ in range(least):
                    place = self._add(part, place)
                return place

    def step(self, state: _State, char: str) -> _Step:
        """From a state over a character: looked up by the caller first."""
        if self._num_steps >= MAX_STEPS:
            self._forget()
        self._num_steps += 1
        after = word_class[char]
        reached = self._reached(state.kernel, state.before, after)
        kernel = set()
        for place in reached:
            if (found := self._tests[place]) is not None and found[0](char):
                kernel.add(found[1])
            if (letters := self._letters[place]) is not None and (target := letters.get(char)) is not None:
                kernel.add(target)
        ended_before = self._tags_of(reached)
        ended_with: tuple[Tag, ...] = ()
        following: _State | None = None
        if kernel:
            following = self._state(frozenset(kernel), after)
            now = self._reached(following.kernel, after, None)
            ended_with = self._tags_of(now)
            if not any(self._goes_on(place) for place in now):
                following = None
        found_step = _Step(following, ended_before, ended_with, following is None and not ended_with)
        state.steps[char] = found_step
        return found_step

    def ended(self, state: _State) -> tuple[Tag, ...]:
        """Matches that end where the text does."""
        return self._tags_of(self._reached(state.kernel, state.before, _OUTSIDE))

    def _forget(self) -> None:
        """Threads keep the states that they are in."""
        self._states.clear()
        self._num_steps = 0
        kernel = frozenset([self._start])
        self.starts = tuple(self._state(kernel, before) for before in range(4))

    def _state(self, kernel: frozenset[int], before: int) -> _State:
        found = self._states.get((kernel, before))
        if found is None:
            found = self._states[kernel, before] = _State(
                kernel, before, is_checked=not self._checked.isdisjoint(kernel)
            )
        return found

    def _leading_to_checks(self) -> frozenset[int]:
        """Places from which a match may come that is checked: there, an earlier thread does not stand for a later."""
        sources: dict[int, list[int]] = {}
        for place, empty in enumerate(self._empty):
            edge, test, letters = self._edges[place], self._tests[place], self._letters[place]
            targets = [*empty, *(letters or {}).values()]
            targets += [found[1] for found in (edge, test) if found is not None]
            for target in targets:
                sources.setdefault(target, []).append(place)
        waiting = [place for place, tag in enumerate(self._tags) if tag is not None and tag.check is not None]
        found = set(waiting)
        while waiting:
            for place in sources.get(waiting.pop(), ()):
                if place not in found:
                    found.add(place)
                    waiting.append(place)
        return frozenset(found)

    def _reached(self, kernel: Iterable[int], before: int, after: int | None) -> set[int]:
        """What is reached without a character. `after` None: not known yet, so that some edges are not passed."""
        reached, waiting = set(kernel), list(kernel)
        while waiting:
            place = waiting.pop()
            edge = self._edges[place]
            passed = self._empty[place]
            if edge is not None and _is_passed(edge[0], before, after):
                passed = (*passed, edge[1])
            for target in passed:
                if target not in reached:
                    reached.add(target)
                    waiting.append(target)
        return reached

    def _goes_on(self, place: int) -> bool:
        """Whether the next character matters."""
        edge = self._edges[place]
        has_more = self._tests[place] is not None or self._letters[place] is not None
        return has_more or (edge is not None and edge[0] != "<")

    def _tags_of(self, places: Iterable[int]) -> tuple[Tag, ...]:
        return tuple(tag for place in sorted(places) if (tag := self._tags[place]) is not None)


def _is_passed(kind: str, before: int, after: int | None) -> bool:
    if kind == "<":
        return not before & IN_SPACED_WORD
    if after is None:
        return False
    if kind == ">":
        return not after & IN_SPACED_WORD
    return ((before ^ after) & IN_WORD != 0) == (kind == "b")


class _Thread:
    __slots__ = ("ends", "first_unit", "start", "state")

    def __init__(self, state: _State | None, start: int, first_unit: int) -> None:
        self.state = state
        self.start = start
        self.first_unit = first_unit
        self.ends: list[tuple[int, int, tuple[Tag, ...]]] = []  # end, end in units, what ends there


class Scanner:
    """Looks for an automaton's patterns in one text.

    Args:
        max_chars: a match that has begun so long ago holds nothing back any more: what is behind is still found.
        is_eager: tell of a match as soon as there is one, and not when it is as long as it can be.
    """

    def __init__(self, automaton: Automaton, max_chars: int, *, is_eager: bool) -> None:
        self._automaton = automaton
        self._max_chars = max_chars
        self._is_eager = is_eager
        self._threads: list[_Thread] = []  # the earliest first
        self._before = _OUTSIDE
        self._units: list[str] = []  # compared characters since the first thread began
        self._num_dropped = 0  # of them, before
        self._end = 0

    def copy(self) -> Scanner:
        """One that goes on from here with other text."""
        other = Scanner(self._automaton, self._max_chars, is_eager=self._is_eager)
        for thread in self._threads:
            assert thread.state is not None
            twin = _Thread(thread.state, thread.start, thread.first_unit)
            twin.ends = thread.ends[:]
            other._threads.append(twin)
        other._before, other._units, other._num_dropped = self._before, self._units[:], self._num_dropped
        other._end = self._end
        return other

    @property
    def begun(self) -> int | None:
        """Where the earliest match may have begun that is not decided."""
        return self._threads[0].start if self._threads else None

    def feed(self, units: Iterable[tuple[str, int, int]]) -> list[Span]:
        """More text; returns what was found.

        Args:
            units: compared characters, each with the place where it begins and ends.
        """
        found: list[Span] = []
        automaton, threads = self._automaton, self._threads
        classes, before, last = word_class, self._before, self._end
        for unit, start, end in units:
            state = automaton.starts[before]
            first = state.steps.get(unit) or automaton.step(state, unit)
            before = classes[unit]
            if threads:
                self._advance(unit, last, end, found)
                self._units.append(unit)
            if not first.is_dead:
                self._begin(first, unit, start, end, found)
            last = end
        self._before, self._end = before, last
        return found

    def _begin(self, step: _Step, unit: str, start: int, end: int, found: list[Span]) -> None:
        """A match may begin here. An earlier one in the same state stands for it, unless it may turn out to be none."""
        threads = self._threads
        if not threads:
            self._num_dropped += len(self._units)
            self._units = [unit]
        following = step.state
        if following is not None and not following.is_checked and any(other.state is following for other in threads):
            return
        num_units = self._num_dropped + len(self._units)
        thread = _Thread(following, start, num_units - 1)
        if step.ended_with:
            thread.ends.append((end, num_units, step.ended_with))
        if following is not None:
            threads.append(thread)
        if following is None or (self._is_eager and thread.ends):
            self._resolve(thread, found)

    def _advance(self, unit: str, last: int, end: int, found: list[Span]) -> None:
        """Every thread over one more character, which ends at `end`, and the one before at `last`."""
        threads = self._threads
        num_units = self._num_dropped + len(self._units)
        has_ended = False
        seen: list[_State] = []
        for thread in threads:
            state = thread.state
            assert state is not None
            step = state.steps.get(unit) or self._automaton.step(state, unit)
            if step.ended_before:
                thread.ends.append((last, num_units, step.ended_before))
            if step.ended_with:
                thread.ends.append((end, num_units + 1, step.ended_with))
            following = step.state
            if following is not None:
                if following in seen and not following.is_checked:
                    following = None
                else:
                    seen.append(following)
            thread.state = following
            if following is None:
                has_ended = True
                self._resolve(thread, found)
            elif self._is_eager and thread.ends:
                self._resolve(thread, found)
            elif end - thread.start > self._max_chars:
                self._slide(thread, end, found)
        if has_ended:
            threads[:] = [thread for thread in threads if thread.state is not None]
        if threads and (num_old := threads[0].first_unit - self._num_dropped) > self._max_chars:
            del self._units[:num_old]
            self._num_dropped += num_old

    def finish(self) -> list[Span]:
        """Nothing follows; returns what was found."""
        found: list[Span] = []
        for thread in self._threads:
            assert thread.state is not None
            if tags := self._automaton.ended(thread.state):
                thread.ends.append((self._end, self._num_dropped + len(self._units), tags))
            self._resolve(thread, found)
        self._threads.clear()
        return found

    def _resolve(self, thread: _Thread, found: list[Span]) -> bool:
        """Add the longest match of a thread that is one indeed; whether there is one."""
        ends, thread.ends = thread.ends, []
        for end, last_unit, tags in reversed(ends):
            for tag in tags:
                first = thread.first_unit - self._num_dropped
                if tag.check is None or tag.check("".join(self._units[first : last_unit - self._num_dropped])):
                    found.append(Span(thread.start, end, tag))
                    return True
        return False

    def _slide(self, thread: _Thread, end: int, found: list[Span]) -> None:
        """A match is too long to be held back. What has matched of it is found as it is, and what follows apart."""
        has_match = self._resolve(thread, found)
        thread.start = found[-1].end if has_match else end - self._max_chars
