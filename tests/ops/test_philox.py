"""The generator: published words, and numbers that depend on nothing but their key."""

import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.ops import philox

ONES = 0xFFFFFFFF
KNOWN = [  # Random123, kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
IDS = torch.tensor([5, 0, 2**48 - 1, 2**33 + 7])
KEY = {"seed": 2**62 + 12345, "epoch": 3}


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox.philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_an_image_has_its_numbers_in_any_batch_order_and_length():
    whole = philox.uniform(IDS, 23, stream="crop", **KEY)
    assert torch.equal(philox.uniform(IDS.flip(0), 23, stream="crop", **KEY), whole.flip(0))
    assert torch.equal(philox.uniform(IDS[2:3], 9, stream="crop", **KEY), whole[2:3, :9])
    assert philox.uniform(IDS[:0], 5, stream="crop", **KEY).shape == (0, 5)
    assert philox.normal(IDS, 0, stream="noise", **KEY).shape == (4, 0)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_do_not_show(monkeypatch, chunk):
    whole = philox.words(IDS, 10, stream="noise", **KEY)
    monkeypatch.setattr(philox, "_CHUNK", chunk)
    assert torch.equal(philox.words(IDS, 10, stream="noise", **KEY), whole)


def test_whatever_differs_in_the_key_gives_other_numbers():
    seen = set()
    for seed in (0, 1, 2**32):
        for epoch in (0, 1):
            for stream in ("groups", "crop", "crop-1", "noise-1"):
                made = philox.words(IDS, 2, seed=seed, epoch=epoch, stream=stream)
                seen |= {tuple(block) for block in made.flatten(0, 1).tolist()}
    assert len(seen) == 3 * 2 * 4 * len(IDS) * 2
    assert philox.fold_in(1, 1) not in {philox.fold_in(1, 0), philox.fold_in(2, 1), 1}
    assert 0 <= philox.fold_in(2**63 - 1, 2**32 - 1) < 2**63


def test_moments():
    ids = torch.arange(50)
    u = philox.uniform(ids, 4000, stream="crop", **KEY)
    z = philox.normal(ids, 4000, stream="noise", **KEY).double()
    assert (u.min() >= 0) & (u.max() < 1)
    # 200 000 numbers: five standard errors.
    assert abs(u.mean() - 0.5) < 5 * 12**-0.5 / 200_000**0.5
    assert abs(z.mean()) < 5 / 200_000**0.5
    assert abs(z.pow(2).mean() - 1) < 5 * 2**0.5 / 200_000**0.5
    assert abs(z.pow(4).mean() - 3) < 5 * 96**0.5 / 200_000**0.5
    neighbours = (z[:, 1:] * z[:, :-1]).mean()  # Box-Muller's pairs among them
    assert abs(neighbours) < 5 / 200_000**0.5
    assert abs((z[1:] * z[:-1]).mean()) < 5 / 196_000**0.5


@pytest.mark.parametrize(
    ("ids", "key", "stream", "said"),
    [
        (IDS.int(), KEY, "crop", r"give \[B\] int64"),
        (IDS[None], KEY, "crop", r"give \[B\] int64"),
        (torch.tensor([-1]), KEY, "crop", "negative"),
        (torch.tensor([2**48]), KEY, "crop", "2\\*\\*48"),
        (IDS, {"seed": -1, "epoch": 0}, "crop", "seed -1"),
        (IDS, {"seed": 0, "epoch": 2**32}, "crop", "epoch"),
        (IDS, KEY, "dice", "no random stream 'dice'"),
        (IDS, KEY, "crop-", "no random stream"),
        (IDS, KEY, "crop-256", "0 to 255"),
    ],
)
def test_refused(ids, key, stream, said):
    with pytest.raises(SpcxrError, match=said):
        philox.uniform(ids, 1, stream=stream, **key)


def test_streams_have_numbers_of_their_own():
    assert len(set(philox.STREAMS.values())) == len(philox.STREAMS)
    assert all(0 < number < 256 for number in philox.STREAMS.values())
