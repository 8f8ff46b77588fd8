"""Which process of pytest-xdist runs which file: `make test` in three processes on two cores.

Tests on real servers wait for processes to start, for rebalances and for back-off, so two processes
that run them leave the cores idle for a third of the time. A third process fills that time with the
tests that need no servers; it starts no Kafka of its own.
"""

from __future__ import annotations

from typing_extensions import override
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

# Files of these folders, and files, whose tests start servers.
ON_SERVERS = ("tests/integration/", "tests/contract/test_state_store.py")
WITHOUT_SERVERS = "gw2"


class ServersInTwoProcesses(LoadFileScheduling):
    """A file stays in one process; the third process gets no file whose tests start servers."""

    @override
    def _assign_work_unit(self, node: WorkerController) -> None:
        if node.gateway.id == WITHOUT_SERVERS:
            files = (file for file in self.workqueue if not file.startswith(ON_SERVERS))
            file = next(files, None)
            if file is None:
                node.shutdown()
                return
            self.workqueue.move_to_end(file, last=False)
        super()._assign_work_unit(node)
