"""A run of training from its configuration to its end: expert actors, workers of Ray Train, and what is told of it.

`ray-moe train` and `ray_moe.train` are this. The expert actors are those of a service, one that is started for the run
or one that runs already; the workers are started, counted and replaced by Ray Train.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ray_moe.actors.launcher import runtime_env
from ray_moe.actors.spec import NAMESPACE, ServiceSpec
from ray_moe.config import Config
from ray_moe.config_train import TrainConfig
from ray_moe.errors import InvalidConfig, NotFound, RayMoEError, Unavailable
from ray_moe.models.huggingface import Checkpoint
from ray_moe.service import cluster
from ray_moe.service.composition import Service, ServiceProgress
from ray_moe.training.data import check_data
from ray_moe.training.documents import Corpus, byte_tokens, read_rows, tokens_of
from ray_moe.training.gating import check_writable
from ray_moe.training.loop import Progress

POLL_S = 0.2


def train(
    config: Config,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_start: Callable[[ServiceProgress], None] = lambda progress: None,
    *,
    service_name: str = "",
    data: Iterable[Any] | None = None,
) -> Progress:
    """Train as `config.train` says, up to its last step; how far it came.

    Args:
        on_step: hears of every reported step, and of whatever happens.
        on_start: hears how far the start of the expert actors is.
        service_name: train on the expert actors of this running service instead of starting some; `config.ray.address`
            says on which cluster.
        data: what to learn from in place of `train.data`: a `ray.data.Dataset` (`pip install 'ray-moe[data]'`), or any
            other iterable. Each row is a text or a list of token ids, or has one as `text` or `input_ids`. It is read
            once, here, and its tokens lie in Ray's object store (4 bytes each) for all workers while the run lasts.
            The order in which rows come is of no importance: the same rows are the same batches in the same steps,
            whatever is made again, however many workers there are, and when the run is taken up later.

    Raises: as `Service.start`; `InvalidConfig` for settings that contradict each other, or whose result could not be
        published; `NotFound` for a service that does not run; `StepRefused` when a loss or gradient is not finite;
        `Unavailable` when workers were lost more often than `train.max_failures`.
    """
    check(config, is_served=config.train.serve or bool(service_name), has_data=data is not None)
    corpus = None if data is None else read(data, config.model)
    # Ray Train's workers hear of each other only this often, and wait for it in each report (2 s by default).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    with ExitStack() as ending:
        if service_name:
            joined = cluster.join(config.ray)
            ending.callback(cluster.leave, joined)
            spec = find_service(service_name, config)
        else:
            changed = _with_actors(config)
            service = Service(changed, on_start, keep_routers=config.train.serve, reserved=of_workers(config.train))
            ending.enter_context(service)
            if service.spec is None:
                raise Unavailable("the service has not started")
            spec = service.spec
        return _fit(spec, corpus, on_step, ending)


def read(data: Iterable[Any], model: str) -> Corpus:
    """The rows of `data` as tokens of the checkpoint `model`. Raises: `InvalidConfig`; as `Checkpoint.open`."""
    if isinstance(data, (str, bytes)):
        raise InvalidConfig("the data is one text, and must be rows of them; what names files belongs in train.data")
    tokenizer = Checkpoint.open(model).load_tokenizer()
    # A Dataset has rows, but cannot be iterated over by itself.
    rows = data.iter_rows() if hasattr(data, "iter_rows") else data
    return read_rows(rows, byte_tokens if tokenizer is None else tokens_of(tokenizer))


def check(config: Config, is_served: bool, has_data: bool = False) -> None:
    """Refuse at once what no worker could do. Raises: `InvalidConfig`; as `Checkpoint.open`.

    Args: has_data: it is given, and not named by the settings.
    """
    train = config.train
    try:
        import ray.train  # noqa: F401
    except ImportError as error:
        raise InvalidConfig("training needs what Ray Train needs: pip install 'ray-moe[train]'") from error
    if not has_data:
        check_data(train.data)
    elif train.data:
        raise InvalidConfig("the data is given, and train.data names other data: leave one of them out")
    checkpoint = Checkpoint.open(config.model)
    names = _learnable(checkpoint, train)
    for pattern in train.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidConfig(f"train.freeze names {pattern!r}, which no parameter of the backbone is called")
    if train.publish_every and not (is_served and train.publish_folder):
        raise InvalidConfig("train.publish_every needs train.serve: true (or a running service) and publish_folder")
    if train.publish_every:
        from ray_moe.actors.training import gate_choice

        check_writable(checkpoint, gate_choice(train))


def _learnable(checkpoint: Checkpoint, train: TrainConfig) -> list[str]:
    """Names of what there is beside the experts. Raises: as `check_gate`."""
    from ray_moe.actors.training import try_choice

    trial = try_choice(checkpoint, train)
    routed = tuple(f"{path}." for path in (*checkpoint.layers, *(trial.paths if trial else ())))
    names = [name for name in checkpoint.places if not name.startswith(routed)]
    return [*names, *(trial.parameters if trial else ())]


def find_service(name: str, config: Config) -> ServiceSpec:
    """A running service, with the training settings of `config`.

    Raises: `NotFound`; `InvalidConfig` when these do not fit how its experts are cut.
    """
    from ray_moe.actors.training import check_parts

    spec = find_spec(name)
    spec = replace(spec, config=spec.config.model_copy(update={"train": config.train}))
    check_parts(spec)
    return spec


def find_spec(name: str) -> ServiceSpec:
    """A running service as it is. Raises: `NotFound`."""
    try:
        controller = ray.get_actor(f"{name}/controller", NAMESPACE)
    except ValueError:
        raise NotFound(f"no service named {name!r} runs on this cluster; start one with ray-moe serve") from None
    spec: ServiceSpec = ray.get(controller.spec.remote())
    return spec


def of_workers(train: TrainConfig) -> list[dict[str, float]]:
    """What the workers of a run reserve, by resource: all of them, else as many as there may be, down to the fewest."""
    most, least = train.parallel.data, train.parallel.min_data or train.parallel.data
    return [{"CPU": train.num_cpus * n, "GPU": train.num_gpus * n} for n in range(most, least - 1, -1)]


def num_workers(config: Config) -> int | tuple[int, int]:
    """Of a run: the number, or the fewest and the most. Called when the expert actors are there.

    Ray Train (2.60) counts what the nodes have in all, and would wait for what the actors hold.
    """
    train, least = config.train, config.train.parallel.min_data
    if least is None or config.ray.autoscaling:
        return train.parallel.data if least is None else (least, train.parallel.data)
    free, each = cluster.room().free, {"CPU": train.num_cpus, "GPU": train.num_gpus}
    fit = [int((free.get(name, 0.0) + 1e-6) // amount) for name, amount in each.items() if amount]
    return least, max(least, min([train.parallel.data, *fit]))


def _with_actors(config: Config) -> Config:
    parallel = config.train.parallel
    wanted = {"num_actors": parallel.expert, "tensor": parallel.tensor}
    told = {name: number for name, number in wanted.items() if number is not None}
    return config.model_copy(update={"experts": config.experts.model_copy(update=told)})


def _fit(spec: ServiceSpec, corpus: Corpus | None, on_step: Callable[[Progress], None], ending: ExitStack) -> Progress:
    """Run Ray Train's workers to their end, and tell meanwhile what the controller hears."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ray_moe.actors.training import work

    train = spec.config.train
    folder = ending.enter_context(tempfile.TemporaryDirectory(prefix="ray-moe-train-"))
    trainer = TorchTrainer(
        work,
        train_loop_config={"spec": spec, "corpus": None if corpus is None else ray.put(corpus)},
        scaling_config=ScalingConfig(
            num_workers=num_workers(spec.config),
            use_gpu=bool(train.num_gpus),
            resources_per_worker={"CPU": train.num_cpus} | ({"GPU": train.num_gpus} if train.num_gpus else {}),
        ),
        run_config=RunConfig(
            name=train.run_id,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=train.max_failures),
            worker_runtime_env=runtime_env(spec.config.ray, train.num_threads, train.num_gpus),
        ),
    )
    result: list[Any] = []

    def fit() -> None:
        try:
            result.append(trainer.fit())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    controller = spec.find("controller")
    num_told, _ = _ask(controller, 0)  # of another run, perhaps
    last: Progress | None = None
    thread.start()
    while True:
        is_over = not thread.is_alive()
        num_told, news = _ask(controller, num_told)
        for progress in news:
            if last is None or not progress.repeats(last):
                on_step(progress)
            last = progress
        if is_over:
            break
        time.sleep(POLL_S)
    if last is not None and last.failure is not None:
        raise last.failure
    if isinstance(result[0], BaseException):
        raise _cause(result[0])
    return last or Progress(0, train.steps)


def _ask(controller: Any, after: int) -> tuple[int, list[Progress]]:
    """How often the controller was told something, and what since; nothing while it is being restarted."""
    try:
        number, news = ray.get(controller.training.remote(after), timeout=10)
    except (RayError, TimeoutError):
        return after, []
    return number, news


def _cause(error: BaseException) -> BaseException:
    """What a worker raised, out of what Ray Train makes of it."""
    seen: list[BaseException] = [error]
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    seen += failures.values()
    for each in list(seen):
        inner: BaseException | None = each
        while inner is not None:
            if isinstance(inner, RayMoEError):
                return inner
            if isinstance(inner, RayTaskError) and isinstance(inner.cause, RayMoEError):
                return inner.cause
            inner = getattr(inner, "_base_exc", None) or inner.__cause__
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    return Unavailable(f"the workers have ended: {error}".splitlines()[0])
