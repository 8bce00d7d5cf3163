"""What a trained policy finds out from demonstrations alone: levels, switches, samplers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

from diffpolicy.data.joined import Stored, open_store
from diffpolicy.policies.adaptive_guidance import SwitchReport, observed, switching_level
from diffpolicy.policies.autotune import AutotuneReport, autotune
from diffpolicy.policies.changes import check_same_weights
from diffpolicy.policies.choose_level import choose_level
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.few_steps import own_levels, renoises
from diffpolicy.policies.level_report import LevelReport
from diffpolicy.policies.recorded import demonstrations, observation_step
from diffpolicy.policies.rti import RTI


class Choosing(DiffusionPlanner):
    """A policy that chooses settings of its sampling from recorded observations."""

    def with_settings(self, **changes: Any) -> Self:
        """The same weights with other entries of the spec: ``rti``, ``n_action_steps``, ...

        Example:
            >>> fast = policy.with_settings(rti=RTI(t_start=0.3), n_action_steps=1)

        Raises:
            ValueError: settings that do not fit, or that would need other weights.
        """
        check_same_weights(self.spec, changes)
        spec = replace(self.spec, **changes)
        return type(self)(spec, self.denoiser, self.normalizer, self.anchors, self.heads)

    def choose_rti(
        self,
        store: Stored,
        *,
        num_steps: int = 3,
        n_action_steps: int = 1,
        episodes: int = 60,
        seed: int = 0,
        **settings: Any,
    ) -> tuple[Self, LevelReport]:
        """Real-time iteration with the start level chosen from demonstrations.

        Args:
            store: demonstrations, or their path.
            num_steps: network evaluations per warm plan.
            n_action_steps: actions executed per plan.
            episodes: demonstrations used.
            seed: of their choice and of the noise.
            settings: other entries of :class:`~diffpolicy.policies.rti.RTI`.

        Returns:
            The policy with these settings, and why the level was chosen. A student of K steps has
            one level for ``num_steps`` of them, and one by consistency noises between its steps.
        """
        opened, base, how = open_store(store), self, dict[str, Any]()
        if self.spec.trained_steps is not None:
            num_steps = min(num_steps, self.spec.trained_steps)
            how["candidates"] = [float(own_levels(self.spec)[-1 - num_steps])]
        if renoises(self.spec) and settings.get("solver") in (None, "ddim"):
            settings = {"options": self.spec.sampler.options, **settings}
        if settings.get("innovation") is not None and self.spec.observation_step is None:
            base = self.with_settings(observation_step=observation_step(opened))
        base = base.with_settings(rti=None, truncated=None, n_action_steps=n_action_steps)
        rti = RTI(t_start=how.get("candidates", [1.0])[0], num_steps=num_steps, **settings)
        demos = demonstrations(opened, episodes, seed=seed)
        report = choose_level(base, demos, rti, seed=seed, **how)
        return base.with_settings(rti=replace(rti, t_start=report.t_start)), report

    def choose_guidance(
        self, store: Stored, *, threshold: float = 0.991, episodes: int = 60, seed: int = 0
    ) -> tuple[Self, SwitchReport]:
        """Classifier-free guidance that ends where both branches agree on demonstrations.

        ``threshold``: the agreement from which on one is asked. The rest is as in `choose_rti`.
        """
        demos = demonstrations(open_store(store), episodes, length=self.n_obs_steps, seed=seed)
        report = switching_level(self, observed(self, demos, seed), threshold=threshold)
        sampler = replace(self.spec.sampler, guidance_t_min=report.t_min)
        return self.with_settings(sampler=sampler), report

    def choose_truncated(
        self, store: Stored, *, episodes: int = 60, seed: int = 0
    ) -> tuple[Self, LevelReport]:
        """A truncated policy with its start level chosen from demonstrations, as for warm starts.

        Where the plan depends much on the state, a higher one than the anchors' default is better.
        Arguments and result are those of :meth:`choose_rti`.

        Raises:
            ValueError: a policy without truncated settings, or whose level belongs to its weights.
        """
        settings = self.spec.truncated
        if settings is None:
            raise ValueError("a policy without truncated settings: begin with with_anchors(store)")
        other = replace(settings, t_start=0.5 if settings.t_start == 1 else 1.0)
        check_same_weights(self.spec, {"truncated": other})
        demos = demonstrations(open_store(store), episodes, seed=seed)
        report = choose_level(self, demos, settings, seed=seed)
        assert isinstance(report.t_start, float)  # one for all dimensions
        return self.with_settings(truncated=replace(settings, t_start=report.t_start)), report

    def autotune(
        self, store: Stored, nfe: int, *, episodes: int = 60, seed: int = 0, **settings: Any
    ) -> tuple[Self, AutotuneReport]:
        """The policy with a sampler of ``nfe`` evaluations, searched on recorded observations.

        See :func:`diffpolicy.policies.autotune.autotune`, which ``settings`` are of.

        Example:
            >>> quick, report = policy.autotune("data/demos.zarr", 4)
            >>> print(report.table())
        """
        demos = demonstrations(open_store(store), episodes, seed=seed)
        sampler, report = autotune(self, demos, nfe, seed=seed, **settings)
        return self.with_settings(sampler=sampler), report
