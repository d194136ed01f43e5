"""The cards that people know by name: what torch sees of their memory, and how fast they compute and copy.

Memory is what torch reports on Linux (`torch.cuda.get_device_properties`), as printed in public issues and logs; where
none was found, the least part of the memory on the box that other cards of the kind report. Rates are those of
NVIDIA's data sheets and architecture papers: products of matrices of 16 bit with sums in float32, dense, and float32
outside of the tensor cores. Links are four fifths of what the generation of PCI Express can carry one way.
docs/machines.md says more.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

MIB, GIB = 2**20, 2**30
# Bytes a second one way that get through: of PCI Express 3, 4 and 5 with 16 lanes, and with 8.
PCIE3, PCIE4, PCIE5 = 12.6e9, 25.2e9, 50.4e9
PCIE4_X8, PCIE5_X8 = PCIE4 / 2, PCIE5 / 2
# The least part of the memory on the box that torch was seen to report: of GDDR that checks itself, and of others.
_CHECKED, _PLAIN = 0.914, 0.954
_BRANDS = re.compile("nvidia|geforce|quadro|tesla|[rg]tx")
_FORMS = frozenset({"sxm", "sxm2", "sxm4", "sxm5", "pcie", "hbm2", "hbm2e", "hbm3", "hbm3e", "generation", "blackwell",
                    "workstation", "server", "edition", "gpu"})


@dataclass(frozen=True)
class Card:
    """A kind of card."""

    name: str
    """What people call it, without its maker."""
    gigabytes: int
    """The memory on the box, in GiB."""
    memory: int
    """Bytes of it that torch sees."""
    bfloat16: bool
    """Whether it computes in bfloat16 by itself."""
    half: float
    """Floating point operations a second in float16, and in bfloat16 where it has that."""
    single: float
    """The same in float32."""
    link: float
    """Bytes a second from host memory to the card."""
    nvlink: float = 0.0
    """Bytes a second from card to card, one way, where the usual board has NVLink; 0 where copies take the PCI bus."""

    @property
    def full_name(self) -> str:
        """Its name with its memory, such as `A100-80GB`."""
        return f"{self.name.replace(' ', '')}-{self.gigabytes}GB"

    def rate(self, dtype: str) -> float | None:
        """Floating point operations a second in a type such as `float16`; None where it only emulates that."""
        if dtype == "bfloat16" and not self.bfloat16:
            return None
        return {"float16": self.half, "bfloat16": self.half, "float32": self.single}.get(dtype)


def _part(gigabytes: int, part: float = _PLAIN) -> int:
    return int(gigabytes * GIB * part)


# Where a name comes with several memories, the first one is meant if none is said.
CARDS = (
    # Turing, Volta, Pascal: none of them has bfloat16.
    Card("T4", 16, 15095 * MIB, False, 65e12, 8.1e12, PCIE3),
    Card("V100", 16, 16130 * MIB, False, 125e12, 15.7e12, PCIE3, 150e9),
    Card("V100", 32, 32510 * MIB, False, 125e12, 15.7e12, PCIE3, 150e9),
    Card("P100", 16, 16280 * MIB, False, 18.7e12, 9.3e12, PCIE3),
    Card("2060", 6, _part(6), False, 25.8e12, 6.5e12, PCIE3),
    Card("2070", 8, _part(8), False, 29.9e12, 7.5e12, PCIE3),
    Card("2070 Super", 8, _part(8), False, 36.3e12, 9.1e12, PCIE3),
    Card("2080", 8, _part(8), False, 40.3e12, 10.1e12, PCIE3),
    Card("2080 Super", 8, _part(8), False, 44.6e12, 11.2e12, PCIE3),
    Card("2080 Ti", 11, 11011 * MIB, False, 53.8e12, 13.4e12, PCIE3),
    Card("Titan RTX", 24, 24217 * MIB, False, 130.5e12, 16.3e12, PCIE3),
    Card("8000", 48, 48571 * MIB, False, 130.5e12, 16.3e12, PCIE3),
    Card("1080 Ti", 11, 11170 * MIB, False, 11.3e12, 11.3e12, PCIE3),
    # Ampere.
    Card("3050", 8, _part(8), True, 18.2e12, 9.1e12, PCIE4_X8),
    Card("3060", 12, 11931 * MIB, True, 25.5e12, 12.7e12, PCIE4),
    Card("3060 Ti", 8, _part(8), True, 32.4e12, 16.2e12, PCIE4),
    Card("3070", 8, _part(8), True, 40.6e12, 20.3e12, PCIE4),
    Card("3070 Ti", 8, _part(8), True, 43.5e12, 21.7e12, PCIE4),
    Card("3080", 10, _part(10), True, 59.5e12, 29.8e12, PCIE4),
    Card("3080", 12, _part(12), True, 61.3e12, 30.6e12, PCIE4),
    Card("3080 Ti", 12, _part(12), True, 68.2e12, 34.1e12, PCIE4),
    Card("3090", 24, 24259 * MIB, True, 71e12, 35.6e12, PCIE4),
    Card("3090 Ti", 24, 24259 * MIB, True, 80e12, 40e12, PCIE4),
    Card("A4000", 16, 15984 * MIB, True, 76.7e12, 19.2e12, PCIE4),
    Card("A5000", 24, 24114 * MIB, True, 111.1e12, 27.8e12, PCIE4),
    Card("A6000", 48, 48541 * MIB, True, 154.8e12, 38.7e12, PCIE4),
    Card("A10", 24, _part(24, _CHECKED), True, 125e12, 31.2e12, PCIE4),
    Card("A10G", 24, 22587 * MIB, True, 70e12, 31.2e12, PCIE4),
    Card("A40", 48, 45416 * MIB, True, 149.7e12, 37.4e12, PCIE4),
    Card("A100", 40, 40337 * MIB, True, 312e12, 19.5e12, PCIE4, 300e9),
    Card("A100", 80, 81037 * MIB, True, 312e12, 19.5e12, PCIE4, 300e9),
    # Ada and Hopper.
    Card("4060", 8, _part(8), True, 30.2e12, 15.1e12, PCIE4_X8),
    Card("4060 Ti", 16, _part(16), True, 44.1e12, 22.1e12, PCIE4_X8),
    Card("4060 Ti", 8, _part(8), True, 44.1e12, 22.1e12, PCIE4_X8),
    Card("4070", 12, 11874 * MIB, True, 58.3e12, 29.1e12, PCIE4),
    Card("4070 Super", 12, 11874 * MIB, True, 70.9e12, 35.5e12, PCIE4),
    Card("4070 Ti", 12, 11874 * MIB, True, 80.2e12, 40.1e12, PCIE4),
    Card("4070 Ti Super", 16, 15934 * MIB, True, 88.2e12, 44.1e12, PCIE4),
    Card("4080", 16, 16049 * MIB, True, 97.5e12, 48.7e12, PCIE4),
    Card("4080 Super", 16, 15934 * MIB, True, 104.4e12, 52.2e12, PCIE4),
    Card("4090", 24, 24207 * MIB, True, 165.2e12, 82.6e12, PCIE4),
    Card("6000 Ada", 48, 48622 * MIB, True, 364.2e12, 91.1e12, PCIE4),
    Card("L4", 24, _part(24, _CHECKED), True, 121e12, 30.3e12, PCIE4),
    Card("L40", 48, _part(48, _CHECKED), True, 181e12, 90.5e12, PCIE4),
    Card("L40S", 48, 45589 * MIB, True, 362e12, 91.6e12, PCIE4),
    Card("H100", 80, 81082 * MIB, True, 989e12, 67e12, PCIE5, 450e9),
    Card("H100 PCIe", 80, 81008 * MIB, True, 756e12, 51e12, PCIE5),
    Card("H100 NVL", 94, _part(94), True, 835e12, 60e12, PCIE5, 300e9),
    Card("H200", 141, 143156 * MIB, True, 989e12, 67e12, PCIE5, 450e9),
    # Blackwell.
    Card("5060", 8, _part(8), True, 38.4e12, 19.2e12, PCIE5_X8),
    Card("5060 Ti", 16, _part(16), True, 47.4e12, 23.7e12, PCIE5_X8),
    Card("5060 Ti", 8, _part(8), True, 47.4e12, 23.7e12, PCIE5_X8),
    Card("5070", 12, _part(12), True, 61.7e12, 30.9e12, PCIE5),
    Card("5070 Ti", 16, _part(16), True, 87.9e12, 43.9e12, PCIE5),
    Card("5080", 16, _part(16), True, 112.6e12, 56.3e12, PCIE5),
    Card("5090", 32, _part(32), True, 209.5e12, 104.8e12, PCIE5),
    Card("PRO 6000", 96, 97250 * MIB, True, 503.8e12, 125e12, PCIE5),
    Card("B200", 180, 182631 * MIB, True, 2250e12, 75e12, PCIE5, 900e9),
)


def find_card(text: str) -> Card | None:
    """The card that a name means, as people or drivers write it; None for one that is not in the table.

    Case, spaces, and the words NVIDIA, GeForce, RTX, Tesla do not matter; `A100-80GB` says which memory is meant.
    """
    found = variants(text)
    _, gigabytes = _read(text)
    return next((card for card in found if gigabytes in (None, card.gigabytes)), None)


def variants(text: str) -> tuple[Card, ...]:
    """The cards of a name, whatever memory it says: the one that is meant where none is said comes first."""
    words, _ = _read(text)
    for name in ("".join(words), "".join(word for word in words if word not in _FORMS)):
        if found := tuple(card for card in CARDS if _key(card.name) == name):
            return found
    return ()


def near_names(text: str) -> tuple[str, ...]:
    """The names in the table that are most like a text."""
    words, _ = _read(text)
    known = {_key(card.name): card.name.replace(" ", "") for card in CARDS}
    return tuple(known[name] for name in get_close_matches("".join(words), known, 3, 0.5))


def _key(name: str) -> str:
    return "".join(_read(name)[0])


def _read(text: str) -> tuple[tuple[str, ...], int | None]:
    """The words of a name without its brand, and the memory in GiB that it says."""
    plain = re.sub(r"(?<=[0-9])\s+(?=gi?b?\b)", "", _BRANDS.sub(" ", text.lower()))
    words, gigabytes = list[str](), None
    for word in _parts(plain):
        if memory := re.fullmatch("([0-9]{1,3})gi?b?", word):
            gigabytes = int(memory[1])
        else:
            words.append(word)
    return tuple(words), gigabytes


def _parts(plain: str) -> Iterator[str]:
    for word in re.split(r"[\s_-]+", plain.strip()):
        # A memory may be written right behind letters: 4060ti16gb.
        glued = re.fullmatch("(.*[a-z])([0-9]{1,3}gi?b)", word)
        yield from glued.groups() if glued else (word,)
