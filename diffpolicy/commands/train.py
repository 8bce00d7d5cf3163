"""`diffpolicy train`: demonstrations in, a trained and evaluated policy out.

usage: diffpolicy train [group=choice] [key=value] ...

Trains a policy on demonstrations and evaluates it. An experiment is a tested set of choices;
any of them can be overridden: diffpolicy train experiment=demo trainer.steps=2000

With task=..., or an experiment of one, it trains a masked diffusion model of sequences instead, and
the oracles of its reward; `diffpolicy tune` and `diffpolicy prefer` go on from there.
`diffpolicy train task=tfbind8 --print-config` shows what can be set.

$groups

settings:
$settings

trainer.KEY (also policy.KEY, network.KEY, sampler.KEY, evaluation.KEY ...):
$trainer

--print-config shows the composed configuration and stops.
--multirun seed=0,1,2 trainer.lr=1e-3,1e-4 runs every combination (Hydra's sweepers and launchers).
Results: RUN/metrics.csv, curve.png, eval.json, checkpoints/ (last, best), and with video
rollouts.mp4 and contact_sheet.png. The last line printed is `RESULT {json}`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands import sweep
from diffpolicy.commands.options import groups_help, helped, indented
from diffpolicy.commands.preflight import (
    check_environment,
    check_policy,
    check_training,
    check_writable,
    choose_rendering,
    pick_device,
)
from diffpolicy.commands.runs import (
    check_new,
    one_writer,
    print_config,
    print_result,
    stopped,
    trainer_settings,
    write_config,
)
from diffpolicy.commands.stores import d4rl_score, env_spec, open_store
from diffpolicy.config import EvaluationConfig, SequenceTrainConfig, TrainConfig, load_run
from diffpolicy.config_compose import config_dir
from diffpolicy.settings import ConfigError

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.env_spec import EnvSpec
    from diffpolicy.rollout.results import EvalResult

_CLIP_FRAMES = 100  # of a clip; those of many tasks are in memory together
GROUPS = (
    "experiment",
    "task",
    "algorithm",
    "env",
    "data",
    "policy",
    "encoder",
    "network",
    "process",
    "sampler",
    "trainer",
    "evaluation",
)


def help_text() -> str:
    """This module's own text."""
    settings = (config_dir() / "train.yaml").read_text().split("experiment: null\n")[1].strip()
    trainer = (config_dir() / "trainer" / "default.yaml").read_text().strip()
    return helped(
        __doc__, groups=groups_help(GROUPS), settings=indented(settings), trainer=indented(trainer)
    )


def run(arguments: Sequence[str]) -> int:
    """Compose the configuration and train."""
    if sweep.asked(arguments):
        return sweep.multirun("train", arguments, run)
    overrides = [a for a in arguments if a != "--print-config"]
    config = load_run("train", overrides)
    if len(overrides) < len(arguments):
        return print_config(config)
    if isinstance(config, TrainConfig):
        return train(config)
    from diffpolicy.commands.train_sequences import train_sequences

    assert isinstance(config, SequenceTrainConfig)
    return train_sequences(config)


@one_writer
def train(config: TrainConfig, *, resume: bool = False) -> int:
    """Run one training configuration from data to scores."""
    began = time.perf_counter()
    run_dir = check_new(config, resume=resume)
    path = config.data.path
    check_writable(run_dir, *(() if path is None or Path(path).exists() else [path]))
    device = pick_device(config.device, config.threads)
    choose_rendering(config.evaluation.video_episodes)
    check_training(config)
    check_environment(config.env, config.evaluation)
    check_policy(config)
    group = _group()
    if not group.first:
        group.barrier()  # the first process collects
    store = open_store(config)
    if group.first:
        group.barrier()
    policy = make_policy(config, store, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        validate = validator(config, stack, device) if group.first else None
        learn(policy, config, store, validate, resume=resume)
    outcome = policy.last_training
    if outcome is not None and outcome.interrupted:
        return stopped(run_dir, outcome.step)
    if not group.first:
        return 0
    train_s = 0.0 if outcome is None else outcome.train_s
    result = final_evaluation(config, run_dir, str(device))
    _curve(config, run_dir)
    report = {
        "task": config.name,
        "train_s": round(train_s, 1),
        **(summary(result) if result else {}),
    }
    if result:
        report |= d4rl_score(store.attrs, store.num_steps, env_spec(config), result, run_dir)
    print_result(report, began)
    return 0


def _group() -> Any:
    """The processes of a torchrun launch; a group of one otherwise."""
    from diffpolicy.training.process import Group

    return Group()


def make_policy(config: TrainConfig, store: EpisodeStore, device: Any) -> DiffusionPolicy:
    """An untrained policy for the run; everything that can be wrong with it is found here."""
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.transitions import check_fields
    from diffpolicy.learn.learning import Learning

    if Learning.from_config(config.learning).actor_critic is not None:
        check_fields(store)
    spec = {**config.spec(), **_of_actions(config, store), "env_id": config.env.id}
    return DiffusionPolicy.from_dataset(
        store,
        spec=spec,
        normalize=config.data.normalize,
        per_store=config.data.normalizer == "per_store",
        anchors=config.policy.get("anchors"),
        seed=config.seed,
        device=device,
    )


def _of_actions(config: TrainConfig, store: EpisodeStore) -> dict[str, Any]:
    """What the action space says of a policy; unknown when the run needs no environment."""
    if config.evaluation.episodes == config.evaluation.val_episodes == 0:
        return {}
    from diffpolicy.data.observation import by_store_field, obs_fields
    from diffpolicy.rollout.env_spec import describe

    info = describe(env_spec(config))
    shapes = {name: field.shape for name, field in by_store_field(info.obs).items()}
    fields = store.fields
    held = {name: fields[name].shape for name in (*obs_fields(store), "action") if name in fields}
    wanted = {**shapes, "action": (info.action_dim,)}
    if len(held) > 1 and held != wanted:  # from_dataset says what is missing
        raise ConfigError(
            f"{store.name} stores {held}, but {config.env.id} has {shapes} and actions of "
            f"{info.action_dim} entries; convert or collect the data for this one"
        )
    groups = config.policy.get("actions")
    return {
        "action_low": list(info.action_low),
        "action_high": list(info.action_high),
        "actions": info.action_groups if groups is None else groups,
    }


def validator(config: TrainConfig, stack: ExitStack, device: Any) -> Any:
    """The callback that scores a checkpoint on the validation seeds, with one pool of workers."""
    if config.evaluation.val_episodes == 0:
        return None
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.rollout.evaluate import evaluate
    from diffpolicy.rollout.pool.workers import WorkerPool
    from diffpolicy.rollout.rows import AllFailedError

    spec, settings = env_spec(config), config.evaluation
    pool = stack.enter_context(WorkerPool(spec, make_workers(settings, settings.val_episodes)))
    seeds = range(settings.val_seed, settings.val_seed + settings.val_episodes)

    def validate(path: Path, step: int) -> Mapping[str, float]:
        policy = DiffusionPolicy.load(path, device=device)
        try:
            result = evaluate(
                policy,
                spec,
                seeds,
                workers=pool,
                plan_batch=settings.plan_batch,
                success_threshold=config.env.success_threshold,
            )
        except AllFailedError as error:
            # Hours of training are not lost to a simulator; but a score that nobody has is no 0.
            text = f"validation at step {step} has no score, training goes on: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return {}
        metrics = result.metrics()
        if config.env.score not in metrics:  # said in no episode, though in one of random actions
            raise ConfigError(
                f"{config.env.id} reports no {config.env.score!r}; set env.score to one of "
                f"{sorted(metrics)} or give env.success_threshold"
            )
        return {**metrics, "score": metrics[config.env.score]}

    return validate


def make_workers(settings: EvaluationConfig, episodes: int) -> Any:
    """Processes and timeouts for ``episodes`` rollouts."""
    from diffpolicy.rollout.pool.supervisor import Workers

    return Workers(
        num_envs=min(settings.num_envs, episodes),
        num_workers=settings.num_workers,
        timeout=settings.timeout,
    )


def learn(
    policy: DiffusionPolicy,
    config: TrainConfig,
    store: EpisodeStore,
    validate: Any,
    *,
    resume: bool,
) -> None:
    """Write the run's configuration and train."""
    from diffpolicy.learn.learning import Learning
    from diffpolicy.training.run_files import has_run

    trainer = trainer_settings(config.trainer, config.seed)
    if _group().first:
        said = replace(config, process=dict(policy.spec.process))
        write_config(said)
    policy.learn(
        store,
        trainer,
        config.run_dir,
        val_fraction=config.data.val_fraction,
        max_episodes=config.data.max_episodes,
        learning=Learning.from_config(config.learning),
        evaluate=validate,
        resume=resume and has_run(config.run_dir),
        overwrite=config.overwrite,
    )


def final_evaluation(config: TrainConfig, run_dir: Path, device: str) -> EvalResult | None:
    """Score the best checkpoint on the test seeds and write ``eval.json`` and the pictures."""
    settings = config.evaluation
    if settings.episodes == 0:
        return None
    from diffpolicy.api import DiffusionPolicy

    policy = DiffusionPolicy.from_pretrained(run_dir, device=device)
    return evaluate_policy(
        policy, env_spec(config), settings, run_dir, config.env.success_threshold
    )


def evaluate_policy(
    policy: DiffusionPolicy,
    spec: EnvSpec,
    settings: EvaluationConfig,
    output: Path,
    success_threshold: float | None,
    *,
    deterministic: bool = False,
    page: str | None = None,
) -> EvalResult:
    """Roll out on the test seeds; leave ``eval.json`` and any pictures in ``output``.

    Where the environment has several tasks their table is printed. With ``page``, a title, a page
    with a clip of each is written as well.
    """
    from diffpolicy.report.page import write_page
    from diffpolicy.report.tasks import task_table
    from diffpolicy.rollout.evaluate import VideoOptions, evaluate
    from diffpolicy.rollout.video import can_film, save_media

    first = settings.video_episodes
    video = None
    clips = page is not None and can_film()
    if first or clips:
        per_task = {"per_task": 1, "frames": _CLIP_FRAMES} if clips else {}
        video = VideoOptions(first, stride=2, cameras=settings.video_cameras, **per_task)
    result = evaluate(
        policy,
        spec,
        range(settings.seed, settings.seed + settings.episodes),
        workers=make_workers(settings, settings.episodes),
        plan_batch=settings.plan_batch,
        deterministic=deterministic,
        success_threshold=success_threshold,
        video=video,
    )
    result.save(output)
    notes = list(result.notes)
    if first:
        films = [film for film in result.videos if film.seed < settings.seed + first]
        notes += save_media(output, films).notes
    if page is not None:
        notes += write_page(output, result, title=page)[1]
    if "tasks" in result.summary:
        print(task_table(result.summary))
    for note in notes:
        print(f"note: {note}")
    return result


def summary(result: EvalResult) -> dict[str, Any]:
    """The scores of an evaluation as the few numbers of a RESULT line."""
    metrics = result.metrics()
    keep = {
        "n_episodes": "episodes",
        "success": "success",
        "final_success": "final_success",
        "max_reward": "max_reward",
        "return": "return",
        "n_errors": "errors",
        "nfe_per_plan": "nfe",
        "ms_per_plan": "ms_per_plan",
    }
    out: dict[str, Any] = {}
    for source, name in keep.items():
        if source in metrics:
            whole = (
                source in ("n_episodes", "n_errors", "nfe_per_plan")
                and metrics[source].is_integer()
            )
            out[name] = int(metrics[source]) if whole else round(metrics[source], 4)
    tasks = result.summary.get("tasks")
    if tasks is not None:
        out["tasks"] = tasks["mean"]["n_tasks"]
        over = tasks["mean"]["success"]
        if over is not None:
            out["success_over_tasks"] = round(over["value"], 4)
    if "success_low" in metrics:
        out["success_95"] = [round(metrics["success_low"], 3), round(metrics["success_high"], 3)]
    return out


def _curve(config: TrainConfig, run_dir: Path) -> None:
    from diffpolicy.report.figures import plot_curve

    try:
        plot_curve(
            run_dir / "metrics.csv",
            run_dir / "curve.png",
            score=config.env.score,
            title=config.name,
        )
    except (ImportError, ValueError) as error:
        print(f"note: no curve.png: {error}")
