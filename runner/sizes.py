"""Which sizes of pictures a model makes, and what is said of the others."""

import itertools
import math

from runner.inputs import PIXELS
from runner.job import Job
from stages.errors import InvalidInput


def makeable(job: Job, multiple: int) -> Job:
    """The job less the requests whose size the model would silently round; InvalidInput unless they are of a file.

    `multiple` is what the sides of the model's pictures are multiples of, in pixels.
    """
    lost: dict[int, str] = {}
    for request in job.requests:
        if request.width % multiple or request.height % multiple:
            below, above = nearest_sizes((request.width, request.height), multiple)
            text = (f"`size` {request.width}x{request.height}: this model makes multiples of {multiple}; nearest are "
                    f"{below[0]}x{below[1]} and {above[0]}x{above[1]}")
            if not job.listed:
                raise InvalidInput(text)
            lost[request.index] = text
    return job.without(lost) if lost else job


def nearest_sizes(size: tuple[int, int], multiple: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two (width, height) nearest to `size` whose sides are multiples of `multiple` pixels, nearest first."""
    width, height = size
    found = {
        (w, h)
        for w, h in itertools.product(_around(width, multiple), _around(height, multiple))
        if w * h <= PIXELS
    }
    shape = math.log(width / height)
    first, second, *_ = sorted(
        found,
        key=lambda s: (abs(s[0] - width) + abs(s[1] - height), round(abs(math.log(s[0] / s[1]) - shape), 9), s),
    )
    return first, second


def _around(side: int, multiple: int) -> list[int]:
    below = side // multiple * multiple
    return [near for near in (below - multiple, below, below + multiple, below + 2 * multiple) if near > 0]
