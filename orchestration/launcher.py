"""How Dagster's runs are started, and how it is known that one is gone.

Runs are processes of the code server. It reports one that died; but when the server itself is killed or replaced by a
new version, nobody does, and the run would count as running until its longest time is over. So the daemon's run
monitoring asks the server that stands at the run's address now: one that does not know the run has replaced the one
that ran it. A server that does not answer may come back, and says nothing about its runs.

Dagster's own launcher has no such check. It is named in dagster.yaml; what it touches of Dagster beyond the public
names is in this module alone, and tests/unit/test_dagster_instance.py looks at all of it.
"""

from dagster import DagsterRun
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value


class CheckedRunLauncher(DefaultRunLauncher):
    """Dagster's launcher, which also says whether the process of a run is still there."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        client = self._get_grpc_client_for_termination(run.run_id)  # type: ignore[no-untyped-call]
        if client is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        try:
            answer = client.can_cancel_execution(CanCancelExecutionRequest(run_id=run.run_id), timeout=10)
        except Exception as error:
            return CheckRunHealthResult(
                WorkerStatus.RUNNING, f"the code server does not answer: {type(error).__name__}"
            )
        if deserialize_value(answer, CanCancelExecutionResult).can_cancel:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.FAILED, "the code server that ran it was stopped or replaced")
