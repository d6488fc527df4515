"""What the robot tasks share: demonstrations, a policy for a field, and roll-outs as measures."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmft_fast.analysis import plots
from fmft_fast.data import Episodes, Normalizer, Windows, make_windows, read_episodes
from fmft_fast.data.normalise import KINDS
from fmft_fast.envs import evaluate_policy, make_environment, summarise
from fmft_fast.errors import ConfigError, ConfigWarning, MissingDependencyError
from fmft_fast.policies import FlowPolicy, PolicyConfig
from fmft_fast.policies.config import NETWORKS
from fmft_fast.policies.saved import read_policy
from fmft_fast.tasks.base import HIGH, LOW, TASKS, Records, Results, Task, TaskData
from fmft_fast.train import Checkpoint, FitConfig
from fmft_fast.train.config import Settings, key
from fmft_fast.train.trainer import Evaluate

STEPS = (1, 4, 16)
SPLIT_SEED = 0  # the episodes held out are always the same
FIRST_WATCHED = 10_000  # starts rolled out while training lie apart from those of the evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotOptions(Settings):
    """Data, policy and evaluation of a robot task."""

    data: str | None = key(None, "file or folder of demonstrations; else $FMFT_TASK_DATA names it")
    network: str = key("mlp", "network of the policy", choices=tuple(NETWORKS))
    network_options: dict = key({}, "its options, such as width = 512")
    n_obs: int = key(2, "observations that the policy sees", low=1)
    n_action: int = key(8, "actions executed before the next prediction", low=1)
    horizon: int = key(16, "actions predicted", low=1)
    normalizer: str = key("min-max", "of observations and actions", choices=KINDS)
    episodes: int | None = key(
        None, "episodes to train on (default: all but those held out)", low=1
    )
    heldout_share: float = key(0.05, "share of the episodes that is held out", above=0, high=0.5)
    starts: int = key(50, "initial states of an evaluation", low=1)
    noise_seeds: tuple[int, ...] = key(
        (0,), "seeds of the policy's noise; each runs all starts", low=0
    )
    workers: int = key(2, "processes of an evaluation", low=0)
    watch_starts: int = key(
        0, "other initial states, rolled out while training: gives the metric failure", low=0
    )
    watch_steps: tuple[int, ...] = key((1,), "numbers of Euler steps of these roll-outs", low=1)

    def __post_init__(self) -> None:
        """Check every value, before hours of training end in an evaluation that cannot work."""
        super().__post_init__()
        for name in ("noise_seeds", "watch_steps"):
            numbers = getattr(self, name)
            if len(set(numbers)) < len(numbers):
                raise ConfigError(f"{name}: expected different numbers, got {list(numbers)}")


def data_variable(task: str) -> str:
    """Name the environment variable that tells where the demonstrations of a task lie.

    Raises:
        ConfigError: it is no robot task.
    """
    known = TASKS.get(task)
    if not isinstance(known, RobotTask):
        raise ConfigError(f"expected the name of a robot task, got {task!r}; write TASK=PATH")
    return f"FMFT_{task.upper()}_DATA"


class RobotTask(Task):
    """Imitate demonstrations; measured by roll-outs in a simulator.

    While training, `watch_starts` > 0 gives the metric `failure`, 1 - the mean measure of roll-outs
    from other starts than those of the evaluation, by which the best model can be picked.

    Attributes:
        arrays: arrays to read of the demonstrations.
        measure: which of the simulator's measures counts.
    """

    fixed = ("network", "network_options", "n_obs", "n_action", "horizon", "normalizer")
    free = ("starts", "noise_seeds", "workers", "watch_starts", "watch_steps")
    steps: Sequence[int] = STEPS
    pretrain: Mapping[str, Any] = {
        "steps": 9000,
        "batch_size": 256,
        "lr": 2e-3,
        "warmup": 200,
        "time_power": 2.0,
        "ema_decay": 0.999,
        "coupling": "independent",
        "eval_every": 1000,
    }
    # Actions are nearly decided by what is seen, so that independent pairs lose little; at one step
    # their loss is that of flow matching at t = 0, which keeps many steps good when mixed in.
    finetune: Mapping[str, Any] = {
        "steps": 12000,
        "batch_size": 256,
        "lr": 2e-3,
        "warmup": 100,
        "ema_decay": 0.999,
        "coupling": "independent",
        "solver_steps": (1,),
        "fm_weight": 0.05,
        "time_power": 2.0,
        "select": "last",
    }
    arrays: Sequence[str] | None = None
    measure: str

    def __init__(self, options: RobotOptions | None = None) -> None:
        self.options: RobotOptions = options or RobotOptions()
        self._read: tuple[Any, Episodes] | None = None

    def configured(self, options: Mapping[str, Any]) -> RobotTask:
        """Give the task with these options laid over its own."""
        made = copy.copy(self)
        made.options = RobotOptions.from_dict({**self.options.to_dict(), **options})
        return made

    def columns(self, episodes: Episodes) -> tuple[Any, Any]:
        """Give observations [steps, obs_dim] and actions [steps, action_dim] of episodes."""
        raise NotImplementedError

    def data(self) -> str | None:
        """Give the path of the demonstrations, if anybody said where they are."""
        return self.options.data or os.environ.get(data_variable(self.name)) or None

    def demonstrations(self) -> Episodes:
        """Read the demonstrations, once.

        Raises:
            ConfigError: nobody said where they are.
            InputError: they cannot be read.
        """
        path = self.data()
        if path is None:
            variable = data_variable(self.name)
            raise ConfigError(
                f"data: expected the demonstrations of {self.name}, got none; write --data PATH, "
                f"or set {variable}"
            )
        if self._read is None or self._read[0] != path:
            self._read = path, read_episodes(path, arrays=self.arrays)
        return self._read[1]

    def split(self) -> tuple[Episodes, Episodes]:
        """Give the episodes for training and those held out, which are always the same."""
        train, heldout = self.demonstrations().split(self.options.heldout_share, SPLIT_SEED)
        if self.options.episodes is not None:
            train = train.select(range(min(self.options.episodes, train.count)))
        return train, heldout

    def windows(self, episodes: Episodes, config: PolicyConfig) -> Windows:
        """Cut episodes into what a policy sees and predicts."""
        obs, action = self.columns(episodes)
        return make_windows(
            obs,
            action,
            episodes.episode_ends,
            horizon=config.horizon,
            n_obs=config.n_obs,
            n_action=config.n_action,
        )

    def make_field(self) -> FlowPolicy:
        """Make an untrained policy, its normalisers fitted to the training episodes."""
        options = self.options
        obs, action = (torch.as_tensor(column) for column in self.columns(self.split()[0]))
        config = PolicyConfig(
            obs_dim=obs.shape[1],
            action_dim=action.shape[1],
            n_obs=options.n_obs,
            n_action=options.n_action,
            horizon=options.horizon,
            network=options.network,
            network_options=options.network_options,
        )
        return FlowPolicy(
            config,
            Normalizer.fit(obs, options.normalizer),
            Normalizer.fit(action, options.normalizer),
        )

    def read(self, path: str | Path) -> Checkpoint:
        """Read a run or checkpoint, or what `FlowPolicy.save_pretrained` wrote."""
        return read_policy(path)

    def field_of(self, checkpoint: Checkpoint) -> FlowPolicy:
        """Make the policy that a checkpoint describes."""
        return FlowPolicy.like(checkpoint)

    def make_data(self, seed: int, field: nn.Module | None = None) -> TaskData:
        """Give windows in the units of the policy `field`; the split does not depend on the seed.

        x1 is the sequence of actions, [n, *state], and cond the observations, [n, cond_dim].
        """
        policy = FlowPolicy.of(self.make_field() if field is None else field)
        columns = []
        for episodes in self.split():
            windows = self.windows(episodes, policy.config)
            columns.append(policy.encode(windows.obs, windows.action))
        (train, train_cond), (heldout, heldout_cond) = columns
        return TaskData(train, heldout, train_cond, heldout_cond)

    def evaluate(self, field: nn.Module, steps: Sequence[int] = STEPS, *, seed: int = 0) -> Results:
        """Roll out from every start; each measure comes with the ends of its 95 % interval.

        `seed` is added to the seeds of the policy's noise. Where no roll-outs are possible, actions
        are compared with those of held-out demonstrations, with a warning.
        """
        rows = self.compare_instead(field, steps, seed=seed)
        if rows is None:
            rows = self.roll_out(field, steps, seed=seed)
        return {
            n: {
                name + end: getattr(found, part)
                for name, found in measures.items()
                for end, part in (("", "mean"), (LOW, "low"), (HIGH, "high"))
            }
            for (n,), measures in summarise(rows).items()
        }

    def simulator(self) -> str:
        """Name the simulator that fits the demonstrations."""
        return self.name

    def why_no_roll_outs(self, field: nn.Module) -> str | None:
        """Say why the policy `field` cannot be rolled out here; None if it can."""
        config = FlowPolicy.of(field).config
        try:
            environment = make_environment(self.simulator())
        except MissingDependencyError as error:
            return str(error)
        sizes = environment.obs_dim, environment.action_dim
        environment.close()
        if sizes == (config.obs_dim, config.action_dim):
            return None
        return (
            f"{self.simulator()} has {sizes[0]} numbers in an observation and {sizes[1]} in an "
            f"action, this policy {config.obs_dim} and {config.action_dim}"
        )

    def compare_instead(
        self, field: nn.Module, steps: Sequence[int], *, seed: int = 0
    ) -> list[dict[str, Any]] | None:
        """Give `compare_actions` with a warning where roll-outs are impossible, else None."""
        why = self.why_no_roll_outs(field)
        if why is None:
            return None
        warnings.warn(
            f"no roll-outs: {why}; measuring actions on held-out demonstrations instead",
            ConfigWarning,
            stacklevel=3,
        )
        return self.compare_actions(field, steps, seed=seed)

    def roll_out(
        self,
        field: nn.Module,
        steps: Sequence[int],
        *,
        seed: int = 0,
        progress: bool = False,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Give a row per roll-out; see `fmft_fast.envs.evaluate_policy` for further settings."""
        options = self.options
        settings = {"starts": options.starts, "workers": options.workers, **settings}
        return evaluate_policy(
            FlowPolicy.of(field).eval(),
            self.simulator(),
            steps=steps,
            noise_seeds=tuple(seed + number for number in options.noise_seeds),
            progress=progress,
            **settings,
        )

    def compare_actions(
        self, field: nn.Module, steps: Sequence[int], *, seed: int = 0
    ) -> list[dict[str, Any]]:
        """Give `action_error` for each held-out episode and number of steps.

        It is the root mean square distance, in normalised units, between the actions that the
        policy would execute and those recorded.
        """
        policy = FlowPolicy.of(field).eval()
        config = policy.config
        windows = self.windows(self.split()[1], config)
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(windows.action.shape, generator=random)
        now = slice(config.n_obs - 1, config.n_obs - 1 + config.n_action)
        wanted = policy.action_normalizer.normalise(windows.action[:, now])
        rows = []
        for n in steps:
            with torch.no_grad():
                got = policy.predict_action({"obs": windows.obs}, steps=n, noise=noise)["action"]
            gap = (policy.action_normalizer.normalise(got) - wanted).square().mean((1, 2))
            for episode in windows.episode.unique().tolist():
                error = float(gap[windows.episode == episode].mean().sqrt())
                rows.append({"steps": n, "start": episode, "action_error": error})
        return rows

    def noise_floor(self, *, seed: int = 0) -> dict[str, float]:
        """Give nothing: demonstrations are no roll-outs from the same starts."""
        return {}

    def watch(self, config: FitConfig) -> Evaluate | None:
        """Give 1 - the mean measure of roll-outs from starts that no evaluation uses."""
        options = self.options
        if options.watch_starts == 0:
            return None
        starts = range(FIRST_WATCHED, FIRST_WATCHED + options.watch_starts)

        def failure(model: nn.Module) -> Mapping[str, float]:
            place = copy.deepcopy(model).to("cpu", torch.float32)
            rows = self.roll_out(place, options.watch_steps, starts=starts, workers=0)
            return {"failure": 1 - sum(row[self.measure] for row in rows) / len(rows)}

        return failure

    def figures(
        self,
        before: nn.Module,
        after: nn.Module,
        out_dir: str | Path,
        *,
        seed: int = 0,
        results: Mapping[str, Results] | None = None,
        history: Mapping[str, Records] | None = None,
    ) -> list[Path]:
        """Draw measures against N with intervals, and training curves."""
        out = Path(out_dir)
        if results is None:
            fields = {"before": before, "after": after}
            results = {name: self.evaluate(f, seed=seed) for name, f in fields.items()}
        panels = {
            measure: {
                name: [
                    (n, row[measure + LOW], row[measure], row[measure + HIGH])
                    for n, row in run.items()
                ]
                for name, run in results.items()
            }
            for measure in next(iter(next(iter(results.values())).values()))
            if not measure.endswith((LOW, HIGH))
        }
        files = [plots.medians(panels, out / "quality.png", xlabel="Euler steps N", log_y=False)]
        if history:
            files.append(plots.training_curves(history, out / "training.png"))
        return files
