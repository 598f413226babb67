"""Any order of refreshes, reuses, claims, uploads and waiting, against a model of what must come of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.services.auth.house import ORIGIN, a_caller, caller_of, new_device, one_time_key, register, rules

from whispr.kit.clock import ManualClock
from whispr.kit.errors import Failure
from whispr.services.auth.models import OneTimeKey, PrekeyUpload

T = TypeVar("T")

GRACE = 10.0


class OverRules(RuleBasedStateMachine):
    """A machine with a loop, a clock and auth's rules of its own."""

    urls: ClassVar[tuple[str, str]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.stack = AsyncExitStack()
        self.auth = self.run(self.stack.enter_async_context(rules(*self.urls, self.clock)))

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.run(self.stack.aclose())
        self.loop.close()


class RefreshMachine(OverRules):
    """One family. The model knows of each token its successor, when it was used, and whether that one was used."""

    tokens = Bundle("tokens")

    @initialize(target=tokens)
    def begin(self) -> str:
        _, opened = self.run(register(self.auth))
        self.session_id = opened.session_id
        self.revoked = False
        self.used_at: dict[str, float] = {}
        self.successor: dict[str, str] = {}
        return opened.refresh_token

    @rule(seconds=st.sampled_from([0.0, 1.0, GRACE, GRACE + 0.001, 3600.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def clean(self) -> None:
        self.run(self.auth.housekeeping.clean())

    @rule(target=tokens, token=tokens)
    def refresh(self, token: str) -> str:
        expected = self.expect(token)
        if expected not in ("new", "same"):
            with pytest.raises(Failure) as refused:
                self.run(self.auth.sessions.refresh(token, None, ORIGIN))
            assert refused.value.code == expected
            self.revoked = True
            return token
        got = self.run(self.auth.sessions.refresh(token, None, ORIGIN)).refresh_token
        if expected == "new":
            assert got not in self.used_at
            assert got not in self.successor.values()
            self.used_at[token] = self.clock.time()
            self.successor[token] = got
        assert got == self.successor[token]
        return got

    @rule(token=tokens, count=st.integers(2, 4))
    def refresh_at_once(self, token: str, count: int) -> None:
        expected = self.expect(token)

        async def all_at_once() -> list[Any]:
            calls = [self.auth.sessions.refresh(token, None, ORIGIN) for _ in range(count)]
            return await asyncio.gather(*calls, return_exceptions=True)

        answers = self.run(all_at_once())
        if expected in ("new", "same"):
            (got,) = {answer.refresh_token for answer in answers}
            if expected == "new":
                self.used_at[token] = self.clock.time()
                self.successor[token] = got
            assert got == self.successor[token]
        else:
            codes = {answer.code for answer in answers}
            assert expected in codes
            assert codes <= {expected, "session_revoked"}
            self.revoked = True

    def expect(self, token: str) -> str:
        if self.revoked:
            return "session_revoked"
        if token not in self.used_at:
            return "new"
        fresh = self.clock.time() - self.used_at[token] <= GRACE
        return "same" if fresh and self.successor[token] not in self.used_at else "refresh_reused"

    @invariant()
    def a_family_lives_until_it_is_revoked(self) -> None:
        if hasattr(self, "session_id"):
            assert self.run(self.auth.sessions.is_live(self.session_id)) is not self.revoked


class PrekeyMachine(OverRules):
    """One device. The model is a queue of keys and the set of those ever handed out."""

    @initialize(count=st.integers(0, 4))
    def begin(self, count: int) -> None:
        device = new_device(count)
        _, tokens = self.run(register(self.auth, device))
        self.caller = caller_of(tokens)
        self.asker = a_caller()
        self.queue = list(device.one_time_prekeys)
        self.given: set[bytes] = set()
        self.ever: list[OneTimeKey] = list(device.one_time_prekeys)

    @rule(count=st.integers(1, 4))
    def upload(self, count: int) -> None:
        keys = tuple(one_time_key(len(self.ever) + 1000 + n) for n in range(count))
        self.put(keys)
        self.queue += keys
        self.ever += keys

    @precondition(lambda self: self.ever)
    @rule(data=st.data())
    def upload_again(self, data: st.DataObject) -> None:
        keys = data.draw(
            st.lists(st.sampled_from(self.ever), min_size=1, max_size=4, unique_by=lambda k: k.key_id)
        )
        self.put(tuple(keys))

    @rule(count=st.integers(1, 6))
    def claim_at_once(self, count: int) -> None:
        async def all_at_once() -> list[Any]:
            return await asyncio.gather(
                *(self.auth.prekeys.claim(self.asker, self.caller.user_id) for _ in range(count))
            )

        answers = self.run(all_at_once())
        got = [bundle.one_time_prekey for (bundle,) in answers]
        taken = [key.public_key for key in got if key is not None]
        assert len(set(taken)) == len(taken)
        assert not self.given & set(taken)
        assert len(taken) == min(count, len(self.queue))
        assert set(taken) == {key.public_key for key in self.queue[: len(taken)]}
        self.given |= set(taken)
        self.queue = self.queue[len(taken) :]

    @rule(count=st.integers(1, 4), data=st.data())
    def claim_while_uploading_again(self, count: int, data: st.DataObject) -> None:
        again = (
            tuple(data.draw(st.lists(st.sampled_from(self.ever), max_size=3, unique_by=lambda k: k.key_id)))
            if self.ever
            else ()
        )

        async def all_at_once() -> list[Any]:
            claims = [self.auth.prekeys.claim(self.asker, self.caller.user_id) for _ in range(count)]
            upload = self.auth.prekeys.upload(self.caller, PrekeyUpload(one_time_prekeys=again))
            return (await asyncio.gather(upload, *claims))[1:]

        answers = self.run(all_at_once())
        taken = [bundle.one_time_prekey.public_key for (bundle,) in answers if bundle.one_time_prekey]
        assert len(set(taken)) == len(taken)
        assert not self.given & set(taken)
        self.given |= set(taken)
        self.queue = [key for key in self.queue if key.public_key not in self.given]

    def put(self, keys: tuple[OneTimeKey, ...]) -> None:
        self.run(self.auth.prekeys.upload(self.caller, PrekeyUpload(one_time_prekeys=keys)))

    @invariant()
    def the_stock_is_what_was_not_given(self) -> None:
        if hasattr(self, "caller"):
            assert self.run(self.auth.prekeys.counts(self.caller)).one_time_prekeys == len(self.queue)


@pytest.mark.parametrize("machine", [RefreshMachine, PrekeyMachine])
def test_machine(machine: type[OverRules], rules_url: str, valkey_url: str) -> None:
    machine.urls = (rules_url, valkey_url)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
