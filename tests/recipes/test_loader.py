"""The order of the images: the same however many processes and micro-batches share it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ghl.recipes.distributed import World
from ghl.recipes.loader import Order, collate
from ghl.recipes.schedule import Decay, image_size


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def passes(order, count):
    """The batches of `count` passes as a DataLoader asks for them."""
    loader = DataLoader(
        list(range(order.images)),
        batch_sampler=order,
        generator=order.generator,
        collate_fn=list,
    )
    return [list(loader) for _ in range(count)]


def test_one_process_has_the_order_of_pytorchs_loader():
    loader = DataLoader(
        list(range(10)), batch_size=4, shuffle=True, generator=generator(), collate_fn=list
    )
    expected = [list(loader) for _ in range(3)]
    assert passes(Order(10, 4, generator(), World()), 3) == expected


@given(
    images=st.integers(1, 60),
    batch_size=st.integers(1, 30),
    size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
)
def test_parts_make_up_the_steps_of_one_process(images, batch_size, size, accumulate):
    order = generator().get_state()

    def begin(rank, size, accumulate):
        fresh = torch.Generator()
        fresh.set_state(order)
        return Order(images, batch_size, fresh, World(rank, size), accumulate)

    (chunks,) = passes(begin(0, 1, 1), 1)
    try:
        parts = [begin(rank, size, accumulate) for rank in range(size)]
    except ValueError:
        assert batch_size < size * accumulate or images < size
        return
    if len(chunks) > 1 and len(chunks[-1]) < size * min(2, batch_size // size):
        chunks.pop()
    pieces = [passes(part, 1)[0] for part in parts]
    assert [len(own) for own in pieces] == [len(part) for part in parts]
    assert parts[0].steps == len(chunks)
    for step, chunk in enumerate(chunks):
        cut = parts[0].cut(len(chunk))
        own = [mine[step * accumulate :][:cut] for mine in pieces]
        assert [number for mine in own for piece in mine for number in piece] == chunk
        assert parts[0].size(step) == len(chunk)
        sizes = [len(piece) for mine in own for piece in mine]
        full = batch_size // (size * accumulate)
        assert min(2, full, len(chunk) // size) <= min(sizes)
        assert max(sizes) <= max(3, -(-batch_size // (size * accumulate)))
        assert max(sizes) - min(sizes) <= 1
        assert [part.own(step) for part in parts] == [sum(map(len, mine)) for mine in own]


@given(images=st.integers(1, 40), batch_size=st.integers(1, 9), size=st.integers(1, 5))
def test_testing_reads_every_image_once(images, batch_size, size):
    seen = []
    parts = [Order(images, batch_size, None, World(rank, size)) for rank in range(size)]
    batches = [list(part) for part in parts]
    assert len({len(own) for own in batches}) == 1
    for part, own in zip(parts, batches, strict=True):
        assert all(own)  # with nothing to count, there is still an image for the forward
        for step, numbers in enumerate(own):
            seen += numbers if part.own(step) else []
            assert part.own(step) in (0, len(numbers))
    assert sorted(seen) == list(range(images))


def test_a_pass_that_was_cut_off_goes_on_at_the_right_image():
    order = Order(23, 4, generator(), World(1, 2), accumulate=2)
    order.note_begin()
    first, second = passes(order, 2)
    again = Order(23, 4, generator(99), World(1, 2), accumulate=2)
    again.generator.set_state(order.begun)
    again.step = 3
    (rest,) = passes(again, 1)
    assert rest == first[6:]
    again.step = 0
    assert passes(again, 1) == [second]


@pytest.mark.parametrize(
    ("images", "batch_size", "message"),
    [
        (50, 5, r"--batch-size 5: expected at least 6, .* of 3 processes times --accumulate 2"),
        (2, 8, r"--batch-size 8: expected 3 images or more to train on, one for each .*, found 2"),
    ],
)
def test_nobody_goes_without_images(images, batch_size, message):
    with pytest.raises(ValueError, match=message):
        Order(images, batch_size, generator(), World(0, 3), accumulate=2)


def test_collate_stacks_numbers():
    images, classes, damaged = collate([(torch.zeros(1, 2, 2), 3), (torch.ones(1, 2, 2), 4)])
    assert images[:, 0, 0, 0].tolist() == [0, 1]
    assert (classes.tolist(), classes.dtype, damaged) == ([3, 4], torch.int64, [])


def test_warm_up_rises_linearly_and_the_cosine_falls_from_there():
    factor = Decay("cosine", steps=20, warmup=4)
    assert [factor(step) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factor(12) == pytest.approx(0.5)
    assert factor(20) == pytest.approx(0)
    assert Decay("constant", steps=20, warmup=4)(19) == 1


def test_images_grow_to_their_full_size():
    sizes = [image_size(epoch, 9, first=96, last=224) for epoch in range(9)]
    assert sizes == [96, 112, 136, 160, 176, 200, 224, 224, 224]
    assert [image_size(epoch, 3, 100, 100) for epoch in range(3)] == [100] * 3
    assert image_size(0, 1, 96, 224) == 224
