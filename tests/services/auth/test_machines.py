"""Any order of refreshes, reuses, claims, uploads, steps of a link and waiting, against a model of what must come of it."""

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
from nacl.signing import SigningKey
from tests.services.auth.house import ORIGIN, a_caller, caller_of, new_device, one_time_key, register, rules
from tests.stack import PASSWORD

from whispr.kit.clock import ManualClock
from whispr.kit.errors import Failure
from whispr.services.auth.models import NO_CODES, OneTimeKey, PrekeyUpload
from whispr.services.auth.service.links import check_code, finish_message

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


LINK_SECONDS, CONFIRM_SECONDS = 60, 120


class LinkMachine(OverRules):
    """One link and two devices that hold its token. The model knows who claimed it, what came after, and until when."""

    @initialize()
    def begin(self) -> None:
        self.signers = [SigningKey.generate() for _ in range(2)]
        self.newcomers = [new_device(signing=signer) for signer in self.signers]
        _, tokens = self.run(register(self.auth))
        self.caller = caller_of(tokens)
        self.link = self.run(self.auth.links.begin(self.caller, PASSWORD, NO_CODES))
        self.stored, self.until = "waiting", self.clock.time() + LINK_SECONDS
        self.claimer, self.wrong, self.session_id = -1, 0, None
        self.signed_in = True

    @property
    def status(self) -> str:
        is_over = self.stored in ("waiting", "claimed", "confirmed") and self.clock.time() >= self.until
        return "expired" if is_over else self.stored

    def move(self, status: str, seconds: float) -> None:
        self.stored, self.until = status, self.clock.time() + seconds

    def refused(self, work: Awaitable[Any]) -> str:
        with pytest.raises(Failure) as failure:
            self.run(work)
        return failure.value.code

    @rule(seconds=st.sampled_from([0.0, 1.0, 59.0, 60.0, 120.0, 3600.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def clean(self) -> None:
        self.run(self.auth.housekeeping.clean())

    @rule()
    def log_out(self) -> None:
        self.run(self.auth.sessions.log_out(self.caller))
        self.signed_in = False

    @rule(who=st.integers(0, 1), count=st.integers(1, 3))
    def claim(self, who: int, count: int) -> None:
        def work() -> Awaitable[Any]:
            return self.auth.links.claim(self.link.token, self.newcomers[who], ORIGIN)

        over = {"finished": "link_used", "expired": "link_expired", "refused": "link_refused"}
        if self.status in over:
            assert self.refused(work()) == over[self.status]
        elif not self.signed_in:
            assert self.refused(work()) == "link_refused"
        elif self.status != "waiting" and who != self.claimer:
            assert self.refused(work()) == "link_used"
        else:

            async def at_once() -> list[Any]:
                return await asyncio.gather(*(work() for _ in range(count)))

            device = self.newcomers[who]
            keys = (self.link.token, self.link.id, device.identity_key, device.signing_key)
            assert {answer.check_code for answer in self.run(at_once())} == {check_code(*keys)}
            if self.status == "waiting":
                self.claimer = who
                self.move("claimed", CONFIRM_SECONDS)

    @rule(is_right=st.booleans())
    def confirm(self, is_right: bool) -> None:
        code = "000000"
        if self.claimer >= 0:
            device = self.newcomers[self.claimer]
            code = check_code(self.link.token, self.link.id, device.identity_key, device.signing_key)
        if not is_right:
            code = f"{(int(code) + 1) % 1_000_000:06}"
        work = self.auth.links.confirm(self.caller, self.link.id, code)
        over = {"waiting": "link_not_claimed", "expired": "link_expired", "refused": "link_refused"}
        if self.status in over:
            assert self.refused(work) == over[self.status]
        elif is_right:
            self.run(work)
            if self.status == "claimed":
                self.move("confirmed", LINK_SECONDS)
        elif self.status == "finished":
            assert self.refused(work) == "link_used"
        else:
            assert self.refused(work) == "wrong_check_code"
            self.wrong += 1
            if self.wrong == 3:
                self.move("refused", 0)

    @rule()
    def refuse(self) -> None:
        work = self.auth.links.refuse(self.caller, self.link.id)
        if self.status == "finished":
            assert self.refused(work) == "link_used"
        else:
            self.run(work)
            if self.status != "expired":
                self.move("refused", 0)

    @rule(who=st.integers(0, 1), count=st.integers(1, 3))
    def finish(self, who: int, count: int) -> None:
        signature = self.signers[who].sign(finish_message(self.link.token)).signature

        def work() -> Awaitable[Any]:
            return self.auth.links.finish(self.link.token, signature, ORIGIN)

        over = {"expired": "link_expired", "refused": "link_refused"}
        if self.status in over:
            assert self.refused(work()) == over[self.status]
        elif self.status == "waiting":
            assert self.run(work()) == "waiting"
        elif self.status == "finished" and self.clock.time() >= self.until:
            assert self.refused(work()) == "link_used"
        elif who != self.claimer:
            assert self.refused(work()) == "bad_signature"
        elif self.status == "claimed":
            assert self.run(work()) == "claimed"
        elif self.status == "confirmed" and not self.signed_in:
            assert self.refused(work()) == "link_refused"
        else:

            async def at_once() -> list[Any]:
                return await asyncio.gather(*(work() for _ in range(count)))

            (session_id,) = {answer.session_id for answer in self.run(at_once())}
            if self.status == "confirmed":
                self.session_id = session_id
                self.move("finished", LINK_SECONDS)
            assert session_id == self.session_id

    @invariant()
    def only_a_finished_link_has_made_a_device(self) -> None:
        if hasattr(self, "link"):
            devices = self.run(self.auth.devices.page(self.caller, None, 10))
            keys = [device.signing_key for device in devices[1:]]
            is_in = self.stored == "finished"
            assert keys == ([self.newcomers[self.claimer].signing_key] if is_in else [])
            assert self.run(self.auth.links.get(self.caller, self.link.id))[1] == self.status


@pytest.mark.parametrize("machine", [RefreshMachine, PrekeyMachine, LinkMachine])
def test_machine(machine: type[OverRules], rules_url: str, valkey_url: str) -> None:
    machine.urls = (rules_url, valkey_url)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
