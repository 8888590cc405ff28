"""The end of a step for all weights that step together: many weights in an operation, not one.

A host takes 5 to 20 µs for an operation on a GPU, however small: with one weight after the other
that was most of a measured step. Passes over weights go by portions, so that what they make in
between is as large as a portion and not as the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ghl import ranks
from ghl.alignment import statistics
from ghl.alignment.statistics import Measurement, Part
from ghl.alignment.sums import Sums
from ghl.alignment.track import Track


@torch.no_grad()
def close(tracks: Sequence[Track], every: int, distributed: bool, update: bool = False) -> None:
    """The end of a step, before the optimizer changes the weights; `update`: one will."""
    measured = [track for track in tracks if track.is_measured(every)]
    for track in tracks:
        track.before = None  # of a step that raised
    if distributed:
        add_over_ranks([track for track in measured if not track.target.gap])
    for track, found in measure(measured).items():
        track.last = found
    if update:
        keep_weights([t for t in measured if t.last is not None and "batch" in t.last.parts])
    take_signs(tracks, every)


@torch.no_grad()
def after(tracks: Sequence[Track]) -> None:
    """The end of a step, after the optimizer has changed the weights it was to change."""
    for some in portions([track for track in tracks if track.before is not None]):
        before = [track.before for track in some if track.before is not None]
        changes = torch._foreach_sub([track.weight for track in some], before)
        parts = statistics.of_batch(changes, [track.sums for track in some], before)
        for track, part in zip(some, parts, strict=True):
            assert track.last is not None
            track.last.parts["update"] = part
            track.last.gaps.pop("update", None)
    for track in tracks:
        track.next_step()


@torch.no_grad()
def measure(tracks: Sequence[Track]) -> dict[Track, Measurement]:
    """What each track says of the step in progress."""
    found = {track: track.finding() for track in tracks}
    for some in portions([track for track in tracks if not track.target.gap]):
        norms = torch._foreach_norm([track.weight for track in some])
        for track, norm in zip(some, norms, strict=True):
            found[track].weight_norm = norm
        measurable = [t for t in some if t.batch and not {"layer", "batch"} & found[t].gaps.keys()]
        for track, part in zip(measurable, of_signals(measurable), strict=True):
            found[track].parts["batch"] = part
    return found


def of_signals(tracks: Sequence[Track]) -> list[Part]:
    """The batch statistic of tracks that have a signal and a direction."""
    signals = [track.signal for track in tracks if track.signal is not None]
    parts = statistics.of_batch(signals, [t.sums for t in tracks], [t.weight for t in tracks])
    for track, part in zip(tracks, parts, strict=True):
        part.factor = -1.0 if track.target.ruled else -track.sums.scale
        part.powers_of_rows += track.of_sum
    return parts


def portions(tracks: Sequence[Track]) -> Iterator[list[Track]]:
    """Tracks whose weights are of one dtype on one device, of about 25 MiB together."""
    for bucket in ranks.buckets([track.weight for track in tracks]):
        yield [tracks[i] for i in bucket]


def keep_weights(tracks: Sequence[Track]) -> None:
    """A copy of each weight, where its G was if there is one: that has been measured by then."""
    for some in portions(tracks):
        for track in some:
            held, track.sums.G = track.sums.G, None
            track.before = torch.empty_like(track.weight) if held is None else held
        copies = [track.before for track in some if track.before is not None]
        torch._foreach_copy_(copies, [track.weight for track in some])


def take_signs(tracks: Sequence[Track], every: int) -> None:
    """The signs of weight.grad: kept for a next step that is measured, and compared in one that is.

    Memory: int8 of the weight's size, from step to step.
    """
    wanted = [t for t in tracks if t.is_measured(every) or t.is_measured(every, ahead=1)]
    for some in portions([track for track in wanted if not track.target.gap]):
        take_signs_of(some, every)


def take_signs_of(tracks: Sequence[Track], every: int) -> None:
    gradients = {track: track.grad for track in tracks if track.grad is not None}
    now = dict(zip(gradients, signs(list(gradients.values())), strict=True))
    before = {}
    for track in tracks:
        if track.last is not None and track.is_measured(every):
            track.last.gaps["sign_flips"] = "weight.grad is None"
            if track in now:
                track.last.gaps["sign_flips"] = "there is no gradient of the step before"
                if track.signs is not None:
                    before[track] = track.signs
        track.signs = now.get(track) if track.is_measured(every, ahead=1) else None
    flips = statistics.flips(list(before.values()), [now[track] for track in before])
    for track, flipped in zip(before, flips, strict=True):
        assert track.last is not None
        track.last.sign_flips = flipped
        del track.last.gaps["sign_flips"]


def signs(gradients: list[Tensor]) -> list[Tensor]:
    """Of every number of the gradients, in int8."""
    if not gradients:
        return []
    found = [torch.empty_like(gradient, dtype=torch.int8) for gradient in gradients]
    torch._foreach_copy_(found, torch._foreach_sign(gradients))
    return found


def add_over_ranks(tracks: Sequence[Track]) -> None:
    """Sum what the weights have gathered over all ranks; each must call it for the same weights.

    A loss that is a mean is averaged over ranks, as DDP averages gradients; so are signals that
    were given, each of which is what its rank adds to the weight.
    """
    for track in tracks:
        track.sums.problem = track.problem() or track.sums.sample_problem
        if track.mean_loss or track.takes_signals:
            track.sums.scale = 1 / dist.get_world_size()
    places = [(track.sums, name) for track in tracks for name in track.sums.fill_in()]
    # apart: a report keeps some of the small ones, and with them the message they are views of
    send([place for place in places if place[1] not in ("G", "H0")])
    send([place for place in places if place[1] in ("G", "H0")])


def send(places: Sequence[tuple[Sums, str]]) -> None:
    """Replace fields by their sums over the ranks, in messages of about 25 MiB."""
    tensors = [getattr(s, name) for s, name in places]
    for bucket in list(ranks.buckets(tensors)):
        message = [tensors[i] for i in bucket]
        ranks.add_over_ranks(message, None)
        for i, total in zip(bucket, message, strict=True):
            tensors[i] = total  # the memory of what was sent is free
            setattr(*places[i], total)
