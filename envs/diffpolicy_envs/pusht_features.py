"""Observation features of Push-T: pure functions of the recorded five-number state.

numpy alone, so that recorded demonstrations become observations without a simulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STATE_DIM = 5
OBSERVATION_DIM = 26

# Nine points on the T in its own frame, in pixels. Fitted by least squares to the key points that
# were recorded beside the states of the human demonstrations (median residual 1.5e-5 px, which is
# float32): so these are the points published Push-T policies see.
KEYPOINTS = np.array(
    [
        [9.2698, 90.0410],
        [-60.9835, -1.1867],
        [60.9128, -1.3934],
        [-0.2705, 25.5436],
        [-14.0649, 122.8159],
        [39.0027, 32.8574],
        [-39.9664, 32.7297],
        [-16.8243, 62.8632],
        [23.5415, -1.7003],
    ]
)

GOAL = (256.0, 256.0, np.pi / 4)
"""Where the block is to be: x, y in pixels, angle in radians."""


def keypoints_from_state(state: NDArray[Any]) -> NDArray[np.float64]:
    """Key points of the block in the world.

    Args:
        state: [T, 5] agent x, y; block x, y in pixels; block angle in radians.

    Returns:
        [T, 9, 2] positions in pixels.
    """
    cos, sin = np.cos(state[:, 4]), np.sin(state[:, 4])
    rotation = np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=-2)
    turned: NDArray[np.float64] = np.einsum("tij,kj->tki", rotation, KEYPOINTS)
    return state[:, None, 2:4] + turned


def observation_from_state(state: NDArray[Any]) -> NDArray[np.float32]:
    """The observation of ``diffpolicy/PushT-v0`` for simulator or recorded states.

    Every feature is continuous in the block's angle, so that the jump from 2 pi to 0 is none.

    Args:
        state: [T, 5] agent x, y; block x, y in pixels (0 to 512, y down); block angle in radians.

    Returns:
        [T, 26] float32: agent (0-1), block (2-3), cosine and sine of the angle (4-5), nine key
        points of the block in the world (6-23), the agent in the block's frame (24-25).

    Raises:
        ValueError: the state is not [T, 5].
    """
    state = np.asarray(state, dtype=np.float64)
    if state.ndim != 2 or state.shape[1] != STATE_DIM:
        raise ValueError(
            "expected states [T, 5] (agent x, y, block x, y, block angle), "
            f"got shape {list(state.shape)}"
        )
    agent, block, angle = state[:, :2], state[:, 2:4], state[:, 4]
    cos, sin = np.cos(angle), np.sin(angle)
    relative = agent - block
    in_block_frame = np.stack(
        [cos * relative[:, 0] + sin * relative[:, 1], cos * relative[:, 1] - sin * relative[:, 0]],
        axis=-1,
    )
    points = keypoints_from_state(state).reshape(len(state), -1)
    turn = np.stack([cos, sin], axis=-1)
    return np.concatenate([agent, block, turn, points, in_block_frame], axis=-1).astype(np.float32)


def distance_to_goal(observation: NDArray[Any]) -> NDArray[np.float64]:
    """How far the block is from its outline.

    Args:
        observation: [T, 26].

    Returns:
        [T] mean distance of its nine key points from where they are to be, in pixels.
    """
    goal = keypoints_from_state(np.array([[0.0, 0.0, *GOAL]]))
    points = np.asarray(observation, dtype=np.float64)[:, 6:24].reshape(-1, len(KEYPOINTS), 2)
    distance: NDArray[np.float64] = np.linalg.norm(points - goal, axis=-1).mean(axis=-1)
    return distance
