"""Runs many trials at a time with Ray Tune, which schedules them, restarts those that died, and halves.

What Ray writes about a study is never read again: a trial resumes from its run directory alone (see study/jobs.py), on
any machine. All machines of a cluster must therefore see the study under the same path.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from study import jobs
from study.cost import Resources
from study.jobs import Job
from study.monitor import Monitor
from utils import RunError

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # study/monitor.py replaces Tune's tables.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default avoids its warning.

WATCH = 3.0  # Whether Ray is alive is checked every so many seconds.


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connects to the Ray cluster at `address`, or starts Ray on this machine if that is None; disconnects at the end.
    Raises `RunError` if Ray cannot be reached or started."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The monitor reports failed trials.
    own = {} if address else {"include_dashboard": False, "object_store_memory": 128 << 20}
    try:
        if address and address != "auto":  # Ray would wait minutes for a silent address.
            host, _, port = address.rpartition(":")
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray has no type of its own for this: a start that takes too long is an `Exception`.
        reason = " ".join(str(error).split())[:200]
        where = f"--address {address}: cannot reach Ray there; a cluster that has a token wants RAY_AUTH_MODE=token"
        raise RunError(f"{where} ({reason})" if address else f"Ray does not start ({reason})") from error
    over = threading.Event()
    threading.Thread(target=watch, args=(over,), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        ray.shutdown()


def watch(over: threading.Event) -> None:
    """Ends this process when Ray is gone, for which Tune would wait for ever. Everything a resume needs is on disk."""
    while not over.wait(WATCH):
        try:
            gone = not any(node["Alive"] for node in ray.nodes())
        except (ray.exceptions.RayError, ConnectionError, RuntimeError):
            gone = True
        if gone and not over.is_set():
            print("error: Ray has stopped; continue with --resume", file=sys.stderr, flush=True)
            os._exit(1)


def max_concurrent_trials(resources: Resources) -> int:
    """Returns how many trials fit at a time; a trial runs on one machine, and a fraction of a GPU is on one GPU."""
    return sum(fitting(node["Resources"], resources) for node in ray.nodes() if node["Alive"])


def fitting(available: Mapping[str, float], resources: Resources) -> int:
    """Returns how many trials with these resources fit on one machine, which has the `available` ones."""
    by_cpus = int(available.get("CPU", 0) / resources.cpus)
    if not resources.gpus:
        return by_cpus
    gpus = available.get("GPU", 0)
    return min(by_cpus, int(gpus / resources.gpus) if resources.gpus >= 1 else int(gpus) * int(1 / resources.gpus))


def has_gpus() -> bool:
    """Returns whether any machine of the cluster has a GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0


def run_all(todo: Sequence[Job], monitor: Monitor, resources: Resources, retries: int, halving: int = 0) -> None:
    """Runs the jobs, `monitor.parallel` at a time, and restarts each whose process or machine dies up to `retries`
    times. If `halving` is not 0, it is the number of epochs of each job, and successive halving (ASHA, Li et al. 2020)
    ends the worse trials early."""
    # max_t is out of reach, because ASHA would end a trial there before its result is written.
    scheduler = ASHAScheduler("epoch", "valid_ppl", "min", max_t=halving + 1, reduction_factor=3) if halving else None
    study = monitor.run.folder.absolute()  # Ray's processes have another working directory.
    one = partial(run_one, todo, study, Path.cwd(), resources, halving)
    with TemporaryDirectory(prefix="tune-", dir=study) as storage:
        tune.Tuner(
            tune.with_resources(one, {"cpu": resources.cpus, "gpu": resources.gpus}),
            param_space={"index": tune.grid_search(list(range(len(todo))))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=monitor.parallel, scheduler=scheduler, reuse_actors=False
            ),
            run_config=tune.RunConfig(
                name="trials", storage_path=storage, verbose=0, callbacks=[MonitorCallback(todo, monitor)],
                stop=Stop(monitor),
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        ).fit()  # fmt: skip


def run_one(
    todo: Sequence[Job], study: Path, directory: Path, resources: Resources, halving: int, config: dict
) -> None:
    """Runs the job with the index `config["index"]` in a Ray worker process and reports its epochs to Tune."""
    if not resources.gpus:  # Otherwise all trials would use the first GPU of the machine.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def report(record: dict) -> None:
        if record["epoch"] != halving:  # ASHA cannot save time after the last epoch.
            tune.report({"epoch": record["epoch"], "valid_ppl": record["valid_ppl"], "work_seconds": record["seconds"]})

    jobs.run(todo[config["index"]], study, directory, max(1, int(resources.cpus)), report)


class MonitorCallback(tune.Callback):
    """Passes the events of trials from Tune to the monitor."""

    def __init__(self, todo: Sequence[Job], monitor: Monitor):
        self.todo, self.monitor = todo, monitor

    def on_trial_start(self, iteration, trials, trial, **info):
        self.monitor.started(self.job(trial))

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if "epoch" in result:
            self.monitor.epoch(self.job(trial), result["epoch"], result["valid_ppl"], result["work_seconds"])

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.monitor.ended(self.job(trial))

    def on_trial_recover(self, iteration, trials, trial, **info):
        self.monitor.retried(self.job(trial))

    def on_trial_error(self, iteration, trials, trial, **info):
        self.monitor.failed(self.job(trial))

    def on_step_end(self, iteration, trials, **info):
        self.monitor.refresh()

    def job(self, trial) -> Job:
        return self.todo[trial.config["index"]]


class Stop(tune.Stopper):
    """Ends all trials when the monitor has a reason to stop the stage."""

    def __init__(self, monitor: Monitor):
        self.monitor = monitor

    def __call__(self, trial_id, result) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self.monitor.reason())
