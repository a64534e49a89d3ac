import os
import sys
from pathlib import Path

import pytest

from bench.peers.protocol import Peer, PeerFailed

WORKER = Path(__file__).resolve().parents[2] / "bench" / "peers" / "torch_attention.py"
SHAPE = {"kv_len": 40, "num_kv_heads": 2, "group": 4, "head_dim": 64, "num_layers": 3}


def start(code: str, tmp_path: Path) -> Peer:
    return Peer("fake", [sys.executable, "-c", code], dict(os.environ), tmp_path / "fake.log")


def test_a_peer_says_what_it_is_prepares_and_measures(tmp_path: Path) -> None:
    code = (
        "print('fake 1.0', flush=True)\n"
        "assert input() == 'prepare 40 2 4 64 3'\nprint('ready', flush=True)\n"
        "assert input() == 'measure 0.5'\nprint('0.25 7', flush=True)\ninput()"
    )
    with start(code, tmp_path) as peer:
        assert peer.version == "fake 1.0"
        peer.prepare(**SHAPE)
        assert peer.measure(0.5) == 0.25


def test_a_peer_that_dies_says_why(tmp_path: Path) -> None:
    code = "print('fake', flush=True)\ninput()\nraise SystemExit('the output is off by 3')"
    with start(code, tmp_path) as peer, pytest.raises(PeerFailed, match="status 1:\nthe output is off by 3"):
        peer.prepare(**SHAPE)


def test_a_peer_that_cannot_start_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="no module of that name"):
        start("raise SystemExit('no module of that name')", tmp_path)


def test_torchs_operator_answers_the_protocol_and_checks_itself(tmp_path: Path) -> None:
    with Peer(
        "torch", [sys.executable, str(WORKER), "torch", "1"], dict(os.environ), tmp_path / "torch.log"
    ) as peer:
        assert peer.version.startswith("torch 2")
        peer.prepare(**SHAPE)
        assert 0 < peer.measure(0.01) < 10
