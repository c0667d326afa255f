"""The drawn schedules are made by their script, and the order that they show is the engine's."""

import pytest

pytest.importorskip("matplotlib")

from docs import drawings


def test_every_drawing_is_made(tmp_path):
    drawings.main(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(drawings.DRAWINGS)


@pytest.mark.parametrize(("panels", "chunks", "threads"), [(6, 6, 2), (5, 2, 3), (3, 7, 4), (4, 4, 1)])
def test_the_wavefront_updates_every_chunk_in_the_order_of_the_panels(panels, chunks, threads):
    tiles = drawings.wavefront(panels, chunks, threads)
    for chunk in range(chunks):
        steps = [tiles[panel][chunk][1] for panel in range(panels)]
        assert steps == sorted(set(steps))
    at_work = [tile for row in tiles for tile in row]
    assert len(set(at_work)) == len(at_work) == panels * chunks  # a thread does one tile a step
