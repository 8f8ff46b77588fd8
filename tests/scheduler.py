"""Which process of pytest-xdist runs which file: `make test` in three processes on two cores.

Tests on real servers mostly wait: for processes to start, for rebalances, for back-off. Two
processes that run them leave the cores idle for half of the time. A third process fills that time
with the tests that need no servers; then it starts servers too.
"""

from __future__ import annotations

from typing_extensions import override
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

# Files of these folders, and files, whose tests start servers.
ON_SERVERS = ("tests/integration/", "tests/contract/test_state_store.py")
THIRD = "gw2"


class ServersLastInThird(LoadFileScheduling):
    """A file stays in one process; the third one begins with the files that need no servers."""

    @override
    def _assign_work_unit(self, node: WorkerController) -> None:
        if node.gateway.id == THIRD:
            files = (file for file in self.workqueue if not file.startswith(ON_SERVERS))
            if (file := next(files, None)) is not None:
                self.workqueue.move_to_end(file, last=False)
        super()._assign_work_unit(node)
