"""Trackers beside metrics.ndjson: TensorBoard, Weights & Biases, MLflow.

Rule: metrics.ndjson is the truth and a tracker is a copy of it. Each tracker is fed by a thread of its own, so one that
is slow or broken costs the run nothing; what lies in the run folder is made again from metrics.ndjson at every start,
so it holds each step once after any kill. Nothing is sent anywhere unless the config says so.
"""

import contextlib
import datetime
import functools
import importlib.util
import json
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from codex_accel import cli, files, redaction, run_folder, telemetry
from codex_accel import events as logs
from codex_accel.config import Section
from codex_accel.errors import UserError
from codex_accel.events import LineLog, event
from codex_accel.train_schema import TrainConfig

Track = Callable[[Mapping[str, Any]], None]
Line = tuple[float, Mapping[str, Any]]  # when, in seconds since 1970, and the line
Started = tuple[Any, str | None, bool]  # a tracker of Accelerate, its id, and whether it is empty and wants the past
IDS = "tracking.json"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}  # what pip calls them
CREDENTIALS = (
    "WANDB_API_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)  # fmt: skip
PLACES = ("WANDB_BASE_URL", "WANDB_ENTITY")  # whose server and account; printed
START_S, END_S = 120.0, 60.0  # how long a tracker may take to start and to end
HASTY_END_S, RELEASE_S = 5.0, 1.0  # and where the run was told to stop, whose last save may still come
MAX_WAITING = 10_000  # lines


# --- before anything heavy --------------------------------------------------------------------------------------------


def require(config: TrainConfig) -> None:
    """Check that every tracker asked for is there and stays off the network unless allowed to reach it.

    Variables of the environment that would steer a tracker are removed, and named on a printed line.

    Raises: UserError with all problems.
    """
    asked, tracking = list(dict.fromkeys(config.tracking.log_with)), config.tracking
    problems = [
        config.problem("tracking.log_with", f"{name} is not installed. Run `pip install {PACKAGES[name]}`.")
        for name in asked
        if not _is_installed(name)
    ]
    if "wandb" in asked and tracking.wandb_mode == "online":
        if not config.allow_network:
            what = "online, but allow_network is false. Set it to true, or wandb_mode to offline."
            problems.append(config.problem("tracking.wandb_mode", what))
        elif not os.environ.get("WANDB_API_KEY"):
            what = "online, but WANDB_API_KEY is not set. Set it, or wandb_mode to offline."
            problems.append(config.problem("tracking.wandb_mode", what))
    if "mlflow" in asked and (uri := tracking.mlflow_uri) is not None:
        if not is_local(uri) and not config.allow_network:
            what = f"'{uri}' is not on this machine, and allow_network is false. Set it to true, or give a folder."
            problems.append(config.problem("tracking.mlflow_uri", what))
        if uri.startswith("sqlite:") and not all(map(_is_installed, ("sqlalchemy", "alembic"))):
            what = f"'{uri}' needs more of MLflow. Run `pip install sqlalchemy alembic`, or give a folder."
            problems.append(config.problem("tracking.mlflow_uri", what))
    if problems:
        raise UserError(*problems)
    if asked:
        _clear_environment(config)


def is_local(uri: str) -> bool:
    """Whether an MLflow URI is a folder (`file:` or a plain path) or an SQLite file of this machine."""
    scheme, colon, rest = uri.partition(":")
    if uri in ("databricks", "databricks-uc", "uc"):
        return False
    if not colon or "/" in scheme:
        return True
    host = rest[2:].partition("/")[0] if rest.startswith("//") else ""
    return scheme.lower() in ("file", "sqlite") and host in ("", "localhost")


def _is_installed(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None  # a folder of that name in the path has no origin


def _clear_environment(config: TrainConfig) -> None:
    families = tuple(f"{name.upper()}_" for name in config.tracking.log_with)
    kept = {name: os.environ[name] for name in (*CREDENTIALS, *PLACES) if name in os.environ}
    ours = {"WANDB_MODE": config.tracking.wandb_mode, "WANDB_ERROR_REPORTING": "false"}
    ours |= {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}  # it sends usage data otherwise
    found = {name: value for name, value in os.environ.items() if name.startswith(families)}
    for name in found:
        del os.environ[name]
    os.environ.update(kept | ours)
    ignored = sorted(name for name, value in found.items() if (kept | ours).get(name) != value)
    taken = [f"{name} = {kept[name]}" for name in PLACES if name in kept and name.startswith(families)]
    for what, names in (("ignores", ignored), ("takes", taken)):
        if names and cli.is_main_process():
            print(f"note    tracking {what} {', '.join(names)} of the environment")


# --- the run ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(config: TrainConfig, accelerator: Any, run_dir: Path, events: LineLog, *, step: int) -> Iterator[Track]:
    """Yield `track(line)`, which takes each line of metrics.ndjson; the trackers end with the block, however it ends.

    `step` is where the run goes on. Only the main process tracks, and a dry run does not. Of a line {"step", "split",
    "loss", ...} the values become "<split>/loss" ... at that step; None is left out.

    Raises: UserError if a tracker does not start at step 0; a run that goes on does so without it, and says so.
    """
    feeds: list[Feed] = []
    if config.tracking.log_with and not config.dry_run:
        from codex_accel import processes

        processes.from_main(accelerator, lambda: feeds.extend(_open(config, run_dir, step)))
    owner = threading.get_ident()

    def track(line: Mapping[str, Any]) -> None:
        for feed in feeds:
            feed.put(line)
            if threading.get_ident() == owner:  # a second thread must not write to the log of events
                feed.tell_once(events)

    ended_well = False
    try:
        yield track
        ended_well = True
    finally:
        _close(feeds, ended_well)
        for feed in feeds:
            feed.tell_once(events)
            if feed.num_lost:
                what = f"{feed.name} lacks {feed.num_lost} lines that {run_folder.METRICS} has"
                event(events, "lost tracking", what)
                print(f"warning: {what}", flush=True)


def _open(config: TrainConfig, run_dir: Path, step: int) -> list["Feed"]:
    try:
        ids = dict(json.loads((run_dir / IDS).read_bytes()))
    except (OSError, ValueError, TypeError):  # a fresh run
        ids = {}
    past, values = _past(run_dir, step), _hyperparameters(config, run_dir)
    feeds = []
    keys = {"mlflow": config.tracking.mlflow_uri or "mlflow"}  # another store does not know the run
    for name in dict.fromkeys(config.tracking.log_with):
        known = ids.get(keys.get(name, name))
        feeds.append(Feed(name, functools.partial(STARTS[name], config, run_dir.absolute(), values, known), past))
    deadline = time.monotonic() + START_S
    failed = [feed for feed in feeds if not feed.has_started(deadline)]
    if failed and not step:
        _close(feeds, False)
        problems = (f"{feed.name} does not start ({feed.problem}). Mend it, or leave it out." for feed in failed)
        raise UserError(*(config.problem("tracking.log_with", problem) for problem in problems))
    ids |= {keys.get(feed.name, feed.name): feed.id for feed in feeds if feed.id}
    with contextlib.suppress(OSError):  # a full disk: the next start makes new ids
        files.write_durable(run_dir / IDS, json.dumps(ids).encode() + b"\n")
    return feeds


def _close(feeds: list["Feed"], ended_well: bool) -> None:
    for feed in feeds:
        feed.end(ended_well)
    deadline = time.monotonic() + (END_S if ended_well else HASTY_END_S)
    for feed in feeds:
        feed.wait(deadline)


def _past(run_dir: Path, step: int) -> list[Line]:
    """Lines up to `step` of metrics.ndjson and system.ndjson, in order of the step, with the time of each.

    metrics.ndjson has training time only (elapsed_s). Its lines are dated as if training had never paused before now.
    """
    lines: list[Line] = []
    measured = [json.loads(line.text) for line in logs.read(run_dir / run_folder.METRICS)]
    now, elapsed_s = time.time(), 0.0
    total_s = max((line["elapsed_s"] for line in measured if "elapsed_s" in line), default=0.0)
    for line in measured:
        elapsed_s = line.get("elapsed_s", elapsed_s)
        lines.append((now - total_s + elapsed_s, line))
    system = run_dir / telemetry.SYSTEM
    for written in logs.read(system) if logs.exists(system) else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # what a kill or a power cut has left half written
            line = {**json.loads(written.text), "split": "system"}
            lines.append((datetime.datetime.fromisoformat(line["time"]).timestamp(), line))
    return sorted((line for line in lines if line[1]["step"] <= step), key=lambda line: line[1]["step"])


def _hyperparameters(config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """The resolved configuration by dotted key, masked, and from run.json what the run was made from; plain values."""
    document = json.loads((run_dir / "run.json").read_bytes())
    provenance = document.pop("provenance")
    found: dict[str, Any] = {f"run.parent.{r['kind']}": r["manifest_digest"] for r in document.pop("parents")}
    found |= {f"run.{key}": value for key, value in document.items()}
    found |= {f"run.{key}": provenance[key] for key in ("code_version", "git", "python")}
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        prefix, value = waiting.pop(0)
        if isinstance(value, Section):
            waiting += [(f"{prefix}.{name}".lstrip("."), getattr(value, name)) for name in type(value).model_fields]
        else:
            found[prefix] = value
    plain, found = (str, int, float, bool), redaction.value(found)
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in found.items()}


def _values(line: Mapping[str, Any]) -> dict[str, Any]:
    """{"train/loss": 3.2, ...} of a line; "nan" and "inf", which JSON has no numbers for, are numbers again."""
    return {
        f"{line['split']}/{name}": float(value) if isinstance(value, str) else value
        for name, value in line.items()
        if name not in ("step", "split", "time") and value is not None
    }


# --- the trackers -----------------------------------------------------------------------------------------------------
# Each function starts one, empty, through Accelerate's class for it, and returns it with its id, if it has one.


def _start_tensorboard(config: TrainConfig, run_dir: Path, values: dict[str, Any], _: str | None) -> Started:
    from accelerate.tracking import TensorBoardTracker
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    tracker = TensorBoardTracker("tensorboard", run_dir, purge_step=0)  # a viewer drops what it has read before
    tracker.start()
    for summary in hparams(values, {}):  # Accelerate's own way makes two more folders at every start
        tracker.writer.file_writer.add_summary(summary)
    return tracker, None, True


def _start_wandb(config: TrainConfig, run_dir: Path, values: dict[str, Any], known: str | None) -> Started:
    tracking, folder = config.tracking, run_dir / "wandb"
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):  # else in the home folder
        os.environ[f"WANDB_{name}_DIR"] = str(folder / "local")
    import wandb
    from accelerate.tracking import WandBTracker

    offline = tracking.wandb_mode == "offline"
    if offline and known:
        for old in folder.glob(f"offline-run-*-{known}"):
            shutil.rmtree(old)
    settings = wandb.Settings(
        mode=tracking.wandb_mode, root_dir=str(run_dir), silent=True, console="off", save_code=False,
        disable_code=True, disable_git=True, x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
        x_save_requirements=False, sagemaker_disable=True,
    )  # fmt: skip
    known = known or secrets.token_hex(4)
    resume = None if offline else "allow"
    project = redaction.text(tracking.project)
    tracker = WandBTracker(project, id=known, name=run_dir.name, resume=resume, settings=settings)
    tracker.start()
    tracker.store_init_configuration(values)
    return tracker, known, offline


def _start_mlflow(config: TrainConfig, run_dir: Path, values: dict[str, Any], known: str | None) -> Started:
    import mlflow
    from accelerate.tracking import MLflowTracker

    uri, own = config.tracking.mlflow_uri, run_dir / "mlflow"
    if uri is None:
        metrics = list(own.glob(f"*/{known}/metrics"))
        known = known if metrics else None
        for folder in metrics:
            shutil.rmtree(folder)
            folder.mkdir()
    elif ":" not in uri:
        own = Path(uri).absolute()
    mlflow.set_tracking_uri(own.as_uri() if uri is None or ":" not in uri else uri)
    tracker = MLflowTracker(redaction.text(config.tracking.project), run_id=known, run_name=run_dir.name)
    tracker.start()
    if known is None:  # MLflow refuses a parameter that has changed, and a run may go on with some that have
        tracker.store_init_configuration(values)
    return tracker, tracker.active_run.info.run_id, uri is None


STARTS = {"tensorboard": _start_tensorboard, "wandb": _start_wandb, "mlflow": _start_mlflow}


def _log(name: str, tracker: Any, when: float, line: Mapping[str, Any]) -> None:
    # TensorBoard gets float32: of float64 its fast loader (2.21, the default) shows nothing and says nothing
    more: dict[str, dict[str, Any]] = {"tensorboard": {"walltime": when}, "mlflow": {"timestamp": int(when * 1000)}}
    tracker.log(_values(line), step=line["step"], **more.get(name, {}))


def _finish(name: str, tracker: Any, ended_well: bool) -> None:
    if name == "mlflow":
        import mlflow

        mlflow.end_run("FINISHED" if ended_well else "KILLED")
    elif name == "wandb":
        tracker.run.finish(exit_code=0 if ended_well else 1)
    else:
        tracker.finish()


def _release(name: str) -> None:
    """Let go of what would wait at the end of the interpreter: wandb's service process, for as long as it takes."""
    if name == "wandb":
        with contextlib.suppress(Exception):  # it has died, or was never there
            import wandb

            wandb.teardown()


class Feed:
    """One tracker, and the thread that starts it, logs to it and ends it."""

    def __init__(self, name: str, start: Callable[[], Started], past: list[Line]):
        self.name, self.problem, self.num_lost = name, "", 0
        self.id: str | None = None
        self._start, self._past, self._last_step = start, past, 0
        self._has_started = self._told = self._ended_well = False
        self._waiting: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._ready, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def put(self, line: Mapping[str, Any]) -> None:
        """Hand over one line; never waits."""
        if self._thread.is_alive() and self._waiting.qsize() < MAX_WAITING:
            self._waiting.put((time.time(), line))
        else:
            self._lose(1, "does not keep up")

    def has_started(self, deadline: float) -> bool:
        """Wait for the start; False if it failed, or took until `deadline` of the monotonic clock."""
        if not self._ready.wait(max(0.0, deadline - time.monotonic())):
            self._lose(0, f"no answer for {START_S:.0f} s")
        return self._has_started

    def end(self, ended_well: bool) -> None:
        """Let it end after the lines that wait."""
        self._ended_well = ended_well
        self._waiting.put(None)

    def wait(self, deadline: float) -> None:
        """Wait for the end; a tracker that is not there by `deadline` of the monotonic clock is left behind."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._lose(max(0, self._waiting.qsize() - 1), "does not end")
            release = threading.Thread(target=_release, args=(self.name,), daemon=True)
            release.start()
            release.join(RELEASE_S)

    def tell_once(self, events: LineLog) -> None:
        """Report the first problem, as an event and on a line."""
        if self.problem and not self._told:
            self._told = True
            what = f"{self.name}: {self.problem}. {run_folder.METRICS} has every line."
            event(events, "failed tracking", what)
            print(f"warning: {what}", flush=True)

    def _lose(self, count: int, why: object) -> None:
        with self._lock:
            self.num_lost += count
        self.problem = self.problem or redaction.words(why)

    def _work(self) -> None:
        try:
            tracker, self.id, is_empty = self._start()
            self._has_started = True
        except Exception as error:
            self._lose(0, f"{type(error).__name__}: {error}")
            _release(self.name)
            return
        finally:
            self._ready.set()
        past, self._past = self._past, []
        for when, line in past if is_empty else ():
            self._log(tracker, when, line)
        while (waiting := self._waiting.get()) is not None:
            self._log(tracker, *waiting)
        try:
            _finish(self.name, tracker, self._ended_well)
        except Exception as error:
            self._lose(0, f"{type(error).__name__}: {error}")
        _release(self.name)

    def _log(self, tracker: Any, when: float, line: Mapping[str, Any]) -> None:
        # a sample of the machine may come just after the line of a later step, and wandb takes no step twice
        self._last_step = max(self._last_step, line["step"])
        try:
            _log(self.name, tracker, when, {**line, "step": self._last_step})
        except Exception as error:
            self._lose(1, f"{type(error).__name__}: {error}")
