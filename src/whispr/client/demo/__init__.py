"""A demonstration that checks itself: people with several devices talk, change their minds, lose things and are bothered."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from whispr.client.demo import changing, joining, talking
from whispr.client.demo.stage import Stage


async def run(url: str, console: Console, now: Callable[[], float] = time.time) -> int:
    """Demonstrate on the server at `url`. 0 when everything was as expected, else 1 and what was not."""
    with tempfile.TemporaryDirectory(prefix="whispr-demo-") as folder:
        stage = Stage(url, console, Path(folder), now)
        try:
            await talking.people(stage)
            direct = await talking.direct(stage)
            group = await talking.group(stage)
            await talking.absence(stage, group)
            await talking.lost_phone(stage, direct, group)
            await talking.blocked(stage)
            await changing.second_thoughts(stage, group)
            await changing.disappearing(stage, direct)
            scheduled = await changing.scheduled(stage, group)
            await joining.linking(stage, group)
            await changing.scheduled_arrives(stage, group, scheduled)
            await joining.second_factor(stage, group)
            await changing.report(stage)
            await talking.server_view(stage, [direct, group])
            talking.at_rest(stage)
            return stage.summary()
        finally:
            await stage.close()
