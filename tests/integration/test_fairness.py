"""The fairness benchmark's small mode is right: everybody is served, whatever the clock says."""

from benchmarks.fairness import CAP, FAST, play_rounds
from benchmarks.scenario import Options


def test_everybody_is_served_alone_and_beside_a_client_that_wants_much() -> None:
    alone, beside = play_rounds(FAST, Options(fast=True))
    assert (alone.name, beside.name) == ("alone", "beside")
    for played in (alone, beside):
        assert played.served == played.expected == 3 * FAST.clients
        assert played.peak_sockets <= CAP
    assert beside.heavy_served == FAST.blobs
    assert beside.heavy_bytes == FAST.blobs * FAST.blob_size
