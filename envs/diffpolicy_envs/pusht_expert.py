"""A scripted expert for Push-T: looks one push ahead in a copy of the physics engine.

It is told the goal's pose at every step, so that one expert serves the goal at rest and the moving
one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.pusht_features import KEYPOINTS
from diffpolicy_envs.simulators import import_pusht

Vector = NDArray[np.float64]

AGENT_RADIUS = 15.0
CLEARANCE = 6.0
"""Pixels between the disc's edge and the block while it goes round."""
SPACING = 15.0
"""Pixels between neighbouring points where a push may begin, along the block's outline."""
TILTS = np.deg2rad([-25.0, 0.0, 25.0])
"""Directions of a push against the inward normal of the outline."""
SHORTEST, LONGEST = 24, 130
"""Longest push that is tried near the goal, and far from it, in pixels."""
STRIDE = 2
"""Pixels by which the disc moves in a step of the look-ahead."""
TRAVEL_COST = 0.004
"""Pixels of key point error that one pixel of way to the push is worth."""
GO, PUSH = 40.0, 22.0
"""How far before the disc its target is set on the way, and while it pushes, in pixels."""
ARRIVED = 4.0
"""Distance in pixels at which a point on the way counts as reached."""
MOVED = 8.0
"""Pixels by which the block may be elsewhere than planned before the plan is dropped."""
DT = 0.01
"""Seconds of a step of the look-ahead; the block stops with the disc, so it sets no speed."""
DONE = 1.5
"""Mean key point error in pixels at which the block is left alone."""

# Corners of the T in its own frame, in order: gym-pusht's two rectangles as one outline.
OUTLINE = np.array(
    [[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]],
    dtype=np.float64,
)


class Push(NamedTuple):
    """One push: where it begins and ends, which way leads there, and what it does to the block.

    Attributes:
        way: points [P, 2] that the disc goes through, the last one where the push begins.
        end: [2] where the disc ends.
        block: pose [3] of the block for which the push was planned.
        goal: pose [3] of the goal for which it was planned.
        expected: poses [L, 3] of the block after every stride of the push.
    """

    way: list[Vector]
    end: Vector
    block: Vector
    goal: Vector
    expected: Vector


def place(points: Vector, pose: Vector) -> Vector:
    """Points [P, 2] of the block's own frame where the block has a pose [3]."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    placed: Vector = pose[:2] + points @ np.array([[cos, sin], [-sin, cos]])
    return placed


def keypoint_error(pose: Vector, goal: Vector) -> float:
    """Mean distance of the nine key points from where they are at the goal, in pixels."""
    difference = place(KEYPOINTS, pose) - place(KEYPOINTS, goal)
    return float(np.linalg.norm(difference, axis=1).mean())


def _starts() -> tuple[Vector, Vector]:
    """Places [S, 2] of the disc beside the outline, and inward normals [S, 2], in its own frame."""
    places, normals = [], []
    for a, b in pairwise([*OUTLINE, OUTLINE[0]]):
        edge = b - a
        length = float(np.linalg.norm(edge))
        inward = np.array([-edge[1], edge[0]]) / length
        count = max(int(length // SPACING), 1)
        for fraction in (np.arange(count) + 0.5) / count:
            places.append(a + fraction * edge - (AGENT_RADIUS + 2.0) * inward)
            normals.append(inward)
    # In the corners between bar and stem the disc does not fit beside one edge only.
    keep = _distances(np.array(places)) >= AGENT_RADIUS + 1.0
    return np.array(places)[keep], np.array(normals)[keep]


def _ring() -> Vector:
    """Points [R, 2] round the T, in its own frame and in order, where the disc is clear of it."""
    reach = AGENT_RADIUS + CLEARANCE + 2.0
    corners = [(-1, -1), (1, -1), (1, 1), (1, 1), (1, 1), (-1, 1), (-1, 1), (-1, 1)]
    points = OUTLINE + reach * np.array(corners, dtype=np.float64)
    return np.concatenate([np.linspace(a, b, 4)[:-1] for a, b in pairwise([*points, points[0]])])


class PushTExpert:
    """Tries pushes in the physics engine and carries out the one that brings the block nearest.

    Every point along the block's outline and a few directions are candidates; each is simulated,
    and cut where the nine key points of the block are nearest to where they belong. The disc then
    goes round the block to the start of the best one, and pushes. A plan is dropped as soon as the
    block is not where the plan has it (a kick, a goal that moved).

    It looks one push ahead only, and has no notion of how its own pushes are disturbed. Its scores
    stand in `diffpolicy_envs.pusht.PushTEnv.expert_action`. An instance serves one episode.
    """

    def __init__(self) -> None:
        self._model: Any = import_pusht().PushTEnv(obs_type="state")
        self._model.reset(seed=0)
        for shape in self._model.space.shapes:
            shape.collision_type = (
                1  # gym-pusht counts contacts of type 0, which takes half the time
            )
        self._places, self._normals = _starts()
        self._ring_points = _ring()
        self._push: Push | None = None
        self._pushing = False

    def action(self, state: Vector, goal: Vector, rng: np.random.Generator) -> Vector:
        """Where to draw the disc from here.

        Args:
            state: [5] agent x, y; block x, y in pixels; block angle in radians.
            goal: [3] pose of the goal: x, y in pixels, angle in radians.
            rng: breaks ties between candidates.

        Returns:
            [2] a point in pixels, within the table of 512 x 512.
        """
        agent, block = state[:2], state[2:5]
        if self._push is not None and self._obsolete(self._push, state, goal):
            self._push = None
        if self._push is None:
            self._pushing = False
            if keypoint_error(block, goal) < DONE:
                return agent.copy()
            self._push = self._plan(agent, block, goal, rng)
        return np.clip(self._follow(self._push, agent), 0.0, 512.0)

    def _follow(self, push: Push, agent: Vector) -> Vector:
        """The next target of the disc: along the way, then along the push."""
        while not self._pushing:
            if np.linalg.norm(push.way[0] - agent) > ARRIVED + 8.0 * (len(push.way) > 1):
                return _towards(agent, push.way[0], GO)
            del push.way[0]
            self._pushing = not push.way
        return _towards(agent, push.end, PUSH)

    def _obsolete(self, push: Push, state: Vector, goal: Vector) -> bool:
        """Whether the push is over, or block or goal are elsewhere than it was planned for."""
        agent, block = state[:2], state[2:5]
        if keypoint_error(goal, push.goal) > MOVED:
            return True
        if not self._pushing:
            return keypoint_error(block, push.block) > MOVED / 2
        if np.linalg.norm(push.end - agent) < ARRIVED / 2:
            return True
        steps = push.expected[:: max(len(push.expected) // 12, 1)]
        return min(keypoint_error(block, pose) for pose in (push.block, *steps)) > MOVED

    def _plan(self, agent: Vector, block: Vector, goal: Vector, rng: np.random.Generator) -> Push:
        """The candidate that brings the key points nearest to the goal, way included."""
        best: tuple[float, Vector, Vector, Vector] | None = None
        longest = int(np.clip(SHORTEST + 2 * keypoint_error(block, goal), SHORTEST, LONGEST))
        for start, normal in zip(self._places, self._normals, strict=True):
            begin = place(start[None], block)[0]
            if not ((begin > 2.0) & (begin < 510.0)).all():
                continue
            travel = TRAVEL_COST * float(np.linalg.norm(begin - agent))
            for tilt in TILTS:
                heading = np.arctan2(normal[1], normal[0]) + block[2] + tilt
                direction = np.array([np.cos(heading), np.sin(heading)])
                poses = self._simulate(begin, direction, block, longest // STRIDE)
                errors = _keypoint_errors(poses, goal) + 1e-6 * rng.random()
                length = int(np.argmin(errors))
                cost = float(errors[length]) + travel
                if best is None or cost < best[0]:
                    best = (
                        cost,
                        begin,
                        begin + STRIDE * (length + 1) * direction,
                        poses[: length + 1],
                    )
        assert best is not None, "a block on the table has a side that can be reached"
        _, begin, end, poses = best
        return Push(self._way(agent, begin, block), end, block.copy(), goal.copy(), poses)

    def _simulate(self, begin: Vector, direction: Vector, block: Vector, steps: int) -> Vector:
        """Poses [L, 3] of the block while the disc moves along a line, L = `steps` strides."""
        model = self._model
        # The last candidate may have left the block pressed by the disc: let the engine forget it.
        model.agent.position, model.agent.velocity = (-1000.0, -1000.0), (0.0, 0.0)
        model.space.reindex_shapes_for_body(model.agent)
        model.space.step(DT)
        model.block.angle = float(block[2])  # the angle first: see `PushTEnv.set_state`
        model.block.position = (float(block[0]), float(block[1]))
        model.block.velocity, model.block.angular_velocity = (0.0, 0.0), 0.0
        model.agent.position = (float(begin[0]), float(begin[1]))
        model.agent.velocity = tuple((STRIDE * direction / DT).tolist())
        for body in (model.agent, model.block):
            model.space.reindex_shapes_for_body(body)
        poses = np.empty((steps, 3))
        for k in range(steps):
            model.space.step(DT)
            poses[k, :2], poses[k, 2] = model.block.position, model.block.angle
        return poses

    def _way(self, agent: Vector, begin: Vector, block: Vector) -> list[Vector]:
        """Points from the disc to the start of a push, round the block; the last one is `begin`."""
        ring = place(self._ring_points, block)
        if self._free(agent, begin, block):
            return [begin]
        count = len(ring)
        first = int(np.argmin(np.linalg.norm(ring - agent, axis=1)))
        last = int(np.argmin(np.linalg.norm(ring - begin, axis=1)))
        forward = [ring[(first + k) % count] for k in range((last - first) % count + 1)]
        backward = [ring[(first - k) % count] for k in range((first - last) % count + 1)]
        ways = []
        for points in (forward, backward):
            clipped = [np.clip(point, 0.0, 512.0) for point in points]
            ways.append(self._shortened(agent, [*clipped, begin], block))
        return min(ways, key=lambda way: _length([agent, *way]))

    def _shortened(self, agent: Vector, way: list[Vector], block: Vector) -> list[Vector]:
        """The way without the points that can be passed by in a straight line."""
        result, here, k = [], agent, 0
        while k < len(way):
            seen = [j for j in range(k, len(way)) if self._free(here, way[j], block)]
            k = max(seen, default=k)
            here = way[k]
            result.append(here)
            k += 1
        return result

    def _free(self, a: Vector, b: Vector, block: Vector) -> bool:
        """Whether the disc can go straight from a to b without touching the block."""
        cos, sin = np.cos(block[2]), np.sin(block[2])
        turn = np.array([[cos, -sin], [sin, cos]])
        a, b = (a - block[:2]) @ turn, (b - block[:2]) @ turn
        count = max(int(np.linalg.norm(b - a) // 5.0), 1)
        points = a + (b - a) * np.linspace(0.0, 1.0, count + 1)[:, None]
        # At both ends it may be as near as it is: it leaves a push, or begins one.
        distances = _distances(points)
        room = min(AGENT_RADIUS + CLEARANCE, distances[0], distances[-1])
        return bool(distances.min() >= room - 1e-6)


def _distances(points: Vector) -> Vector:
    """Distances [P] of points [P, 2] from the T in its own frame; 0 inside."""
    distances = []
    for low, high in (((-60.0, 0.0), (60.0, 30.0)), ((-15.0, 30.0), (15.0, 120.0))):
        outside = np.maximum(np.maximum(low - points, points - high), 0.0)
        distances.append(np.linalg.norm(outside, axis=1))
    nearest: Vector = np.minimum(*distances)
    return nearest


def _keypoint_errors(poses: Vector, goal: Vector) -> Vector:
    """`keypoint_error` of every pose [L, 3]."""
    cos, sin = np.cos(poses[:, 2]), np.sin(poses[:, 2])
    turn = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    points = poses[:, None, :2] + KEYPOINTS @ turn
    errors: Vector = np.linalg.norm(points - place(KEYPOINTS, goal), axis=-1).mean(axis=-1)
    return errors


def _towards(here: Vector, there: Vector, reach: float) -> Vector:
    """A point on the line from here to there, at most `reach` away."""
    difference = there - here
    step: Vector = difference * min(1.0, reach / max(float(np.linalg.norm(difference)), 1e-9))
    return here + step


def _length(points: list[Vector]) -> float:
    """Length of a way through points."""
    return float(sum(np.linalg.norm(b - a) for a, b in pairwise(points)))
