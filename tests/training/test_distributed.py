"""Two gloo processes with the environment of torchrun train one model."""

from __future__ import annotations

import socket

import torch
from training_runs import begun, train_together

from diffpolicy.training.checkpoint import read_bundle


def test_two_processes_agree_and_follow_the_single_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = tmp_path / "two"
    processes = [begun(train_together, two, rank, port) for rank in range(2)]
    single = train_together(tmp_path / "one")
    for process in processes:
        process.join()
        assert process.exitcode == 0
    ranks = [torch.load(two / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for name in single:
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], single[name], rtol=1e-4, atol=1e-5)
    saved = read_bundle(two / "checkpoints" / "0000060", "training/")
    assert torch.equal(saved["params.safetensors"]["net.0.weight"], ranks[0]["net.0.weight"])
